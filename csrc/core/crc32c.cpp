#include "crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace offload {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78;  // bit-reflected 0x1EDC6F41

using Table = std::array<std::uint32_t, 256>;

constexpr std::array<Table, 8> make_slicing_tables() {
  std::array<Table, 8> tables{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    tables[0][i] = crc;
  }
  for (std::size_t t = 1; t < 8; ++t) {
    for (std::size_t i = 0; i < 256; ++i) {
      const std::uint32_t before = tables[t - 1][i];
      tables[t][i] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

constexpr std::array<Table, 8> kSlicing = make_slicing_tables();

#if defined(__x86_64__)

// The crc32 instruction takes three cycles and starts one a cycle, so three independent streams
// fill it. Each stream covers kLane bytes; shifting a finished stream over the lanes behind it is
// a multiplication by x^(8·distance), here by four tables of 256 entries.
constexpr std::size_t kLane = 32768;

// Apply "one zero bit" to a reflected CRC `nbytes`·8 times, by repeated squaring of 32x32 matrices
// over GF(2) (Adler's crc32_combine).
using Matrix = std::array<std::uint32_t, 32>;

std::uint32_t times(const Matrix& matrix, std::uint32_t vector) {
  std::uint32_t sum = 0;
  for (std::size_t i = 0; vector != 0; ++i, vector >>= 1) {
    if (vector & 1) sum ^= matrix[i];
  }
  return sum;
}

struct ShiftTable {
  std::array<Table, 4> bytes;

  explicit ShiftTable(std::size_t nbytes) {
    Matrix power{};  // one zero bit
    power[0] = kPolynomial;
    for (std::size_t i = 1; i < 32; ++i) power[i] = std::uint32_t{1} << (i - 1);
    Matrix total{};
    for (std::size_t i = 0; i < 32; ++i) total[i] = std::uint32_t{1} << i;
    for (std::size_t bits = nbytes * 8; bits != 0; bits >>= 1) {
      if (bits & 1) {
        for (auto& column : total) column = times(power, column);
      }
      Matrix square{};
      for (std::size_t i = 0; i < 32; ++i) square[i] = times(power, power[i]);
      power = square;
    }
    for (std::size_t byte = 0; byte < 4; ++byte) {
      for (std::uint32_t i = 0; i < 256; ++i) bytes[byte][i] = times(total, i << (8 * byte));
    }
  }

  std::uint32_t operator()(std::uint32_t crc) const {
    return bytes[0][crc & 0xFF] ^ bytes[1][(crc >> 8) & 0xFF] ^ bytes[2][(crc >> 16) & 0xFF] ^
           bytes[3][crc >> 24];
  }
};

const ShiftTable& one_lane() {
  static const ShiftTable table(kLane);
  return table;
}

std::uint64_t load_u64(const std::byte* at) {
  std::uint64_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

__attribute__((target("sse4.2,avx2"), always_inline)) inline std::uint64_t crc_byte(
    std::uint64_t crc, std::byte value) {
  return _mm_crc32_u8(static_cast<std::uint32_t>(crc), static_cast<std::uint8_t>(value));
}

// One 64-byte line: checksum it, and stream it to `dst` when copying.
template <bool kCopy>
__attribute__((target("sse4.2,avx2"), always_inline)) inline std::uint64_t crc_line(
    std::uint64_t crc, const std::byte* src, std::byte* dst) {
  if constexpr (kCopy) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + 32), high);
  }
  for (std::size_t i = 0; i < 64; i += 8) crc = _mm_crc32_u64(crc, load_u64(src + i));
  return crc;
}

template <bool kCopy>
__attribute__((target("sse4.2,avx2"))) std::uint32_t crc_hardware(std::uint32_t crc, std::byte* dst,
                                                                  const std::byte* src,
                                                                  std::size_t nbytes) {
  std::uint64_t state = crc ^ 0xFFFFFFFFu;
  // Streaming stores need their destination aligned; the source may lie anywhere.
  if constexpr (kCopy) {
    while (nbytes != 0 && reinterpret_cast<std::uintptr_t>(dst) % 64 != 0) {
      state = crc_byte(state, *src);
      *dst++ = *src++;
      --nbytes;
    }
  }
  const ShiftTable& shift = one_lane();
  while (nbytes >= 3 * kLane) {
    std::uint64_t a = state, b = 0, c = 0;
    for (std::size_t i = 0; i < kLane; i += 64) {
      a = crc_line<kCopy>(a, src + i, dst + i);
      b = crc_line<kCopy>(b, src + kLane + i, dst + kLane + i);
      c = crc_line<kCopy>(c, src + 2 * kLane + i, dst + 2 * kLane + i);
    }
    state = shift(shift(static_cast<std::uint32_t>(a)) ^ static_cast<std::uint32_t>(b)) ^
            static_cast<std::uint32_t>(c);
    src += 3 * kLane;
    if constexpr (kCopy) dst += 3 * kLane;
    nbytes -= 3 * kLane;
  }
  while (nbytes >= 64) {
    state = crc_line<kCopy>(state, src, dst);
    src += 64;
    if constexpr (kCopy) dst += 64;
    nbytes -= 64;
  }
  for (; nbytes != 0; --nbytes) {
    state = crc_byte(state, *src);
    if constexpr (kCopy) *dst++ = *src;
    ++src;
  }
  // Streaming stores are weakly ordered; another thread submits this memory to the drive.
  if constexpr (kCopy) _mm_sfence();
  return static_cast<std::uint32_t>(state) ^ 0xFFFFFFFFu;
}

__attribute__((target("avx2"))) void copy_avx2(std::byte* dst, const std::byte* src,
                                               std::size_t nbytes) {
  const std::size_t head =
      std::min<std::size_t>(nbytes, (64 - reinterpret_cast<std::uintptr_t>(dst) % 64) % 64);
  std::memcpy(dst, src, head);
  std::size_t i = head;
  for (; i + 64 <= nbytes; i += 64) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i + 32), high);
  }
  std::memcpy(dst + i, src + i, nbytes - i);
  _mm_sfence();
}

// Folding (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel
// 2009): 256 bytes of message are replaced by 256 bytes congruent to them modulo the polynomial
// and moved 2048 bits on, by two carry-less multiplications a lane. What is left at the end is 256
// bytes with the same CRC, which the crc32 instruction finishes.
constexpr std::size_t kFold = 256;

constexpr std::uint64_t power_of_x(std::size_t exponent) {
  std::uint32_t value = 0x80000000;  // x^0, reflected
  for (; exponent != 0; --exponent) value = (value >> 1) ^ ((value & 1) ? kPolynomial : 0);
  return std::uint64_t{value} << 1;  // the product of two reflected values is one bit short
}

#define OFFLOAD_FOLD_TARGET target("avx512f,avx512bw,avx512vl,vpclmulqdq,pclmul,sse4.2")

template <bool kCopy>
__attribute__((OFFLOAD_FOLD_TARGET)) std::uint32_t crc_fold(std::uint32_t crc, std::byte* dst,
                                                            const std::byte* src,
                                                            std::size_t nbytes) {
  const std::size_t head =
      kCopy ? std::min<std::size_t>(nbytes, -reinterpret_cast<std::uintptr_t>(dst) % 64) : 0;
  if (nbytes < head + 2 * kFold) return crc_hardware<kCopy>(crc, dst, src, nbytes);
  if (head != 0) {
    crc = crc_hardware<kCopy>(crc, dst, src, head);
    src += head, dst += head, nbytes -= head;
  }
  constexpr std::uint64_t kLow = power_of_x(8 * kFold + 32);
  constexpr std::uint64_t kHigh = power_of_x(8 * kFold - 32);
  const __m512i k = _mm512_set_epi64(kHigh, kLow, kHigh, kLow, kHigh, kLow, kHigh, kLow);
  __m512i lanes[4];
  for (std::size_t i = 0; i < 4; ++i) {
    lanes[i] = _mm512_loadu_si512(src + 64 * i);
    if constexpr (kCopy) _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + 64 * i), lanes[i]);
  }
  lanes[0] =
      _mm512_xor_si512(lanes[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(~crc))));
  std::size_t at = kFold;
  for (; at + kFold <= nbytes; at += kFold) {
    for (std::size_t i = 0; i < 4; ++i) {
      const __m512i next = _mm512_loadu_si512(src + at + 64 * i);
      if constexpr (kCopy) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + at + 64 * i), next);
      }
      lanes[i] = _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(lanes[i], k, 0x00),
                                           _mm512_clmulepi64_epi128(lanes[i], k, 0x11), next, 0x96);
    }
  }
  alignas(64) std::byte folded[kFold];
  for (std::size_t i = 0; i < 4; ++i) {
    _mm512_store_si512(reinterpret_cast<__m512i*>(folded + 64 * i), lanes[i]);
  }
  std::uint64_t state = 0;
  for (std::size_t i = 0; i < kFold; i += 8) state = _mm_crc32_u64(state, load_u64(folded + i));
  crc = ~static_cast<std::uint32_t>(state);
  // The tail's own fence orders these streaming stores too; with no tail it still fences.
  return crc_hardware<kCopy>(crc, kCopy ? dst + at : nullptr, src + at, nbytes - at);
}

bool has_fold() {
  static const bool yes = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("vpclmulqdq");
  return yes;
}

bool has_hardware() {
  static const bool yes = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("avx2");
  return yes;
}

#endif  // __x86_64__

}  // namespace

std::uint32_t crc32c_table(std::uint32_t crc, const void* data, std::size_t nbytes) {
  const auto* at = static_cast<const std::uint8_t*>(data);
  crc = ~crc;
  for (; nbytes >= 8; nbytes -= 8, at += 8) {
    std::uint32_t low, high;
    std::memcpy(&low, at, 4);
    std::memcpy(&high, at + 4, 4);
    low ^= crc;
    crc = kSlicing[7][low & 0xFF] ^ kSlicing[6][(low >> 8) & 0xFF] ^
          kSlicing[5][(low >> 16) & 0xFF] ^ kSlicing[4][low >> 24] ^ kSlicing[3][high & 0xFF] ^
          kSlicing[2][(high >> 8) & 0xFF] ^ kSlicing[1][(high >> 16) & 0xFF] ^
          kSlicing[0][high >> 24];
  }
  for (; nbytes != 0; --nbytes, ++at) crc = (crc >> 8) ^ kSlicing[0][(crc ^ *at) & 0xFF];
  return ~crc;
}

std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t nbytes) {
#if defined(__x86_64__)
  if (has_fold()) return crc_fold<false>(crc, nullptr, static_cast<const std::byte*>(data), nbytes);
  if (has_hardware()) {
    return crc_hardware<false>(crc, nullptr, static_cast<const std::byte*>(data), nbytes);
  }
#endif
  return crc32c_table(crc, data, nbytes);
}

std::uint32_t copy_crc32c(std::uint32_t crc, void* dst, const void* src, std::size_t nbytes) {
#if defined(__x86_64__)
  if (has_fold()) {
    return crc_fold<true>(crc, static_cast<std::byte*>(dst), static_cast<const std::byte*>(src),
                          nbytes);
  }
  if (has_hardware()) {
    return crc_hardware<true>(crc, static_cast<std::byte*>(dst), static_cast<const std::byte*>(src),
                              nbytes);
  }
#endif
  std::memcpy(dst, src, nbytes);
  return crc32c_table(crc, dst, nbytes);
}

void copy_stream(void* dst, const void* src, std::size_t nbytes) {
#if defined(__x86_64__)
  if (has_hardware()) {
    copy_avx2(static_cast<std::byte*>(dst), static_cast<const std::byte*>(src), nbytes);
    return;
  }
#endif
  std::memcpy(dst, src, nbytes);
}

Crc32cFunction crc32c_version(const char* path) {
  if (std::strcmp(path, "table") == 0) return crc32c_table;
#if defined(__x86_64__)
  if (std::strcmp(path, "sse4.2") == 0 && has_hardware()) {
    return [](std::uint32_t crc, const void* data, std::size_t nbytes) {
      return crc_hardware<false>(crc, nullptr, static_cast<const std::byte*>(data), nbytes);
    };
  }
  if (std::strcmp(path, "avx512-vpclmulqdq") == 0 && has_fold()) {
    return [](std::uint32_t crc, const void* data, std::size_t nbytes) {
      return crc_fold<false>(crc, nullptr, static_cast<const std::byte*>(data), nbytes);
    };
  }
#endif
  return nullptr;
}

const char* crc32c_path() {
#if defined(__x86_64__)
  if (has_fold()) return "avx512-vpclmulqdq";
  if (has_hardware()) return "sse4.2";
#endif
  return "table";
}

}  // namespace offload
