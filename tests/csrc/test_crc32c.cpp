// CRC32C: published values, then every version this processor has against the table version, at
// every length and misalignment around the points where a version changes its loop.
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "crc32c.h"

using offload::copy_crc32c;
using offload::copy_stream;
using offload::crc32c;
using offload::crc32c_table;

namespace {

std::vector<std::byte> random_bytes(std::size_t nbytes, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(nbytes);
  for (auto& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

// Every length up to the fold width's double, then around 3·32768 and its multiples.
std::vector<std::size_t> lengths() {
  std::vector<std::size_t> all;
  for (std::size_t n = 0; n <= 600; ++n) all.push_back(n);
  for (std::size_t centre : {1024u, 4096u, 3u * 32768u, 6u * 32768u, 1u << 20}) {
    for (std::size_t n = centre - 66; n <= centre + 66; n += 11) all.push_back(n);
    all.push_back(centre);
  }
  return all;
}

void gives_the_published_values() {
  // RFC 3720, appendix B.4.
  unsigned char bytes[32] = {};
  CHECK_EQ(crc32c(0, bytes, 32), 0x8A9136AAu);
  CHECK_EQ(crc32c_table(0, bytes, 32), 0x8A9136AAu);
  std::memset(bytes, 0xFF, 32);
  CHECK_EQ(crc32c(0, bytes, 32), 0x62A8AB43u);
  for (unsigned char i = 0; i < 32; ++i) bytes[i] = i;
  CHECK_EQ(crc32c(0, bytes, 32), 0x46DD794Eu);
  CHECK_EQ(crc32c(0, "123456789", 9), 0xE3069283u);
  CHECK_EQ(crc32c(0, nullptr, 0), 0u);
}

void every_version_agrees_with_the_table() {
  const auto bytes = random_bytes((1u << 20) + 256, 1);
  for (const char* name : {"sse4.2", "avx512-vpclmulqdq"}) {
    const auto version = offload::crc32c_version(name);
    if (version == nullptr) continue;
    for (const std::size_t nbytes : lengths()) {
      for (const std::size_t lead : {0u, 1u, 7u, 63u}) {
        CHECK_EQ(version(0x12345678u, bytes.data() + lead, nbytes),
                 crc32c_table(0x12345678u, bytes.data() + lead, nbytes));
      }
    }
  }
  CHECK(offload::crc32c_version(offload::crc32c_path()) != nullptr);
  CHECK(offload::crc32c_version("no such version") == nullptr);
}

void parts_continue_each_other() {
  const auto bytes = random_bytes(300'000, 2);
  const std::uint32_t whole = crc32c(0, bytes.data(), bytes.size());
  std::mt19937 random(3);
  for (int i = 0; i < 200; ++i) {
    const std::size_t cut = random() % (bytes.size() + 1);
    const std::uint32_t first = crc32c(0, bytes.data(), cut);
    CHECK_EQ(crc32c(first, bytes.data() + cut, bytes.size() - cut), whole);
  }
}

void copying_versions_copy_those_bytes_and_no_others() {
  const auto bytes = random_bytes((1u << 20) + 256, 4);
  std::vector<std::byte> to(bytes.size() + 128);
  for (const std::size_t nbytes : lengths()) {
    for (const auto& [from_lead, to_lead] : {std::pair{0, 0}, {1, 0}, {0, 1}, {63, 17}}) {
      for (const bool checked : {true, false}) {
        std::memset(to.data(), 0xEE, nbytes + 128);
        std::byte* at = to.data() + 64 + to_lead;
        if (checked) {
          CHECK_EQ(copy_crc32c(7, at, bytes.data() + from_lead, nbytes),
                   crc32c_table(7, bytes.data() + from_lead, nbytes));
        } else {
          copy_stream(at, bytes.data() + from_lead, nbytes);
        }
        CHECK(std::memcmp(at, bytes.data() + from_lead, nbytes) == 0);
        CHECK(at[-1] == std::byte{0xEE} && at[nbytes] == std::byte{0xEE});
      }
    }
  }
}

void one_flipped_bit_anywhere_changes_the_sum() {
  auto bytes = random_bytes(70'000, 5);
  const std::uint32_t whole = crc32c(0, bytes.data(), bytes.size());
  std::mt19937 random(6);
  for (int i = 0; i < 200; ++i) {
    const std::size_t at = random() % bytes.size();
    const auto bit = std::byte{1} << (random() % 8);
    bytes[at] ^= bit;
    CHECK(crc32c(0, bytes.data(), bytes.size()) != whole);
    bytes[at] ^= bit;
  }
}

}  // namespace

int main() {
  gives_the_published_values();
  every_version_agrees_with_the_table();
  parts_continue_each_other();
  copying_versions_copy_those_bytes_and_no_others();
  one_flipped_bit_anywhere_changes_the_sum();
  return check::status();
}
