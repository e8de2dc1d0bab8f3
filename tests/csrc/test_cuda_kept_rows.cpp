// The CUDA kernels of kept rows, run by an emulated grid: to the bit, in place and not.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "emulated_grid.h"

using namespace offload;

namespace {

using Bytes = std::vector<unsigned char>;

constexpr std::size_t kTokens = 37, kChannels = 300;
const std::vector<std::int64_t> kRows = {0, 3, 4, 17, 35};

// Any bits at all: numbers that are none, and minus zero, have to stay what they are.
Bytes anything(std::size_t rows, DType dtype, std::mt19937& random) {
  Bytes found(rows * kChannels * dtype_bytes(dtype));
  for (auto& byte : found) byte = static_cast<unsigned char>(random());
  store(found.data(), kChannels + 1, -0.0f, dtype);
  return found;
}

KeptRowsArrays arrays_of(const Bytes& whole, const Bytes& part, Bytes& out, DType dtype) {
  return {whole.data(), part.data(),  kRows.data(), out.data(),
          kTokens,      kRows.size(), kChannels,    dtype};
}

void rows_are_added_where_they_stand(DType dtype) {
  std::mt19937 random(1);
  const Bytes whole = anything(kTokens, dtype, random);
  const Bytes part = anything(kRows.size(), dtype, random);
  Bytes expected = whole;
  for (std::size_t k = 0; k < kRows.size(); ++k) {
    for (std::size_t channel = 0; channel < kChannels; ++channel) {
      const std::size_t at = static_cast<std::size_t>(kRows[k]) * kChannels + channel;
      const float sum =
          load(whole.data(), at, dtype) + load(part.data(), k * kChannels + channel, dtype);
      store(expected.data(), at, sum, dtype);
    }
  }
  Bytes out(whole.size()), in_place = whole;
  CHECK_EQ(emulated::add_kept_rows(arrays_of(whole, part, out, dtype), 1), 0);
  CHECK_EQ(emulated::add_kept_rows(arrays_of(in_place, part, in_place, dtype), 2), 0);
  for (std::size_t at = 0; at < kTokens * kChannels; ++at) {
    const float one = load(expected.data(), at, dtype);
    for (const Bytes* found : {&out, &in_place}) {
      const float other = load(found->data(), at, dtype);
      // A sum that is no number is one of many such, of which none is any better.
      CHECK(one == other || (std::isnan(one) && std::isnan(other)));
    }
  }
  const std::size_t row = kChannels * dtype_bytes(dtype);
  for (std::size_t token = 0; token < kTokens; ++token) {
    const bool kept = std::find(kRows.begin(), kRows.end(), token) != kRows.end();
    for (const Bytes* found : {&out, &in_place}) {
      if (!kept) CHECK(std::memcmp(found->data() + token * row, &whole[token * row], row) == 0);
    }
  }
}

void rows_are_taken_bit_for_bit(DType dtype) {
  std::mt19937 random(2);
  const Bytes whole = anything(kTokens, dtype, random);
  const std::size_t row = kChannels * dtype_bytes(dtype);
  Bytes out(kRows.size() * row);
  CHECK_EQ(emulated::take_kept_rows(arrays_of(whole, {}, out, dtype), 1), 0);
  for (std::size_t k = 0; k < kRows.size(); ++k) {
    const auto* from = &whole[static_cast<std::size_t>(kRows[k]) * row];
    CHECK(std::memcmp(&out[k * row], from, row) == 0);
  }
}

void nothing_kept_changes_nothing() {
  std::mt19937 random(3);
  const Bytes whole = anything(kTokens, DType::kFloat32, random);
  Bytes out(whole.size());
  KeptRowsArrays given = arrays_of(whole, {}, out, DType::kFloat32);
  given.kept = 0;
  CHECK_EQ(emulated::add_kept_rows(given, 1), 0);
  CHECK(out == whole);
}

}  // namespace

int main() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    rows_are_added_where_they_stand(dtype);
    rows_are_taken_bit_for_bit(dtype);
  }
  nothing_kept_changes_nothing();
  return check::status();
}
