// One element's AdamW update, and the casts around it. This is the definition of the result: the
// scalar, AVX2 and AVX-512 loops and the CUDA kernel are this text, compiled for each of them.
//
// It is the arithmetic of torch.optim.AdamW(fused=True) on a CPU, as its vector loop comes out of
// the compiler: one rounding where a product and a sum are fused here, and two where they are not.
// No operation may be fused or reordered by a compiler: g++ gets -ffp-contract=off, and device code
// calls the intrinsics that nvcc leaves alone.
//
// Everything is in an anonymous namespace, so that each translation unit has a copy of its own,
// compiled for its own processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "adam_constants.h"

#if defined(__CUDA_ARCH__)
#define OFFLOAD_DEVICE __device__ __forceinline__
#elif defined(__CUDACC__)
#define OFFLOAD_DEVICE __host__ __device__ inline
#else
#define OFFLOAD_DEVICE inline
#endif

namespace offload {

namespace {

#if defined(__CUDA_ARCH__)
OFFLOAD_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
OFFLOAD_DEVICE float subtract(float a, float b) { return __fsub_rn(a, b); }
OFFLOAD_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
OFFLOAD_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
OFFLOAD_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
OFFLOAD_DEVICE float root(float a) { return __fsqrt_rn(a); }
OFFLOAD_DEVICE std::uint32_t bits_of(float value) { return __float_as_uint(value); }
OFFLOAD_DEVICE float float_of(std::uint32_t bits) { return __uint_as_float(bits); }
#else
OFFLOAD_DEVICE float add(float a, float b) { return a + b; }
OFFLOAD_DEVICE float subtract(float a, float b) { return a - b; }
OFFLOAD_DEVICE float multiply(float a, float b) { return a * b; }
OFFLOAD_DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
OFFLOAD_DEVICE float divide(float a, float b) { return a / b; }
OFFLOAD_DEVICE float root(float a) { return __builtin_sqrtf(a); }
OFFLOAD_DEVICE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
OFFLOAD_DEVICE float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
#endif

constexpr std::uint32_t kSign = 0x80000000;
constexpr std::uint32_t kInfinity = 0x7F800000;
constexpr std::uint32_t kNan = 0x7FC00000;

// x86 and CUDA make different NaNs; one of them is stored.
OFFLOAD_DEVICE float canonical(float value) {
  const std::uint32_t bits = bits_of(value);
  return float_of((bits & ~kSign) > kInfinity ? kNan : bits);
}

OFFLOAD_DEVICE float from_bfloat16(std::uint16_t value) {
  return float_of(static_cast<std::uint32_t>(value) << 16);
}

// To the nearest, to even where two are as near; what is too small for a normal number is rounded
// like any other (the instructions of AVX-512 make it zero).
OFFLOAD_DEVICE std::uint16_t to_bfloat16(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<std::uint16_t>((bits & ~kSign) > kInfinity ? kNan >> 16 : rounded);
}

OFFLOAD_DEVICE float from_float16(std::uint16_t value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value & 0x8000) << 16;
  const std::uint32_t rest = value & 0x7FFF;
  // Exponent and mantissa moved into place are the value less a factor of 2^112: exact, also where
  // it is no normal number of float16.
  const float scaled = multiply(float_of(rest << 13), 0x1p112f);
  const std::uint32_t finite = bits_of(scaled);
  const std::uint32_t special = rest == 0x7C00 ? kInfinity : kNan;
  return float_of(sign | (rest >= 0x7C00 ? special : finite));
}

OFFLOAD_DEVICE std::uint16_t to_float16(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = (bits & kSign) >> 16;
  const std::uint32_t rest = bits & ~kSign;
  const std::uint32_t normal = (rest - 0x38000000 + 0x0FFF + ((rest >> 13) & 1)) >> 13;
  // Below the smallest normal number, adding 0.5 leaves as many bits of the mantissa as there are
  // to keep, rounded as all sums are.
  const std::uint32_t tiny = bits_of(add(float_of(rest), 0.5f)) - 0x3F000000;
  std::uint32_t half = rest < 0x38800000 ? tiny : normal;
  half = rest >= 0x477FF000 ? 0x7C00 : half;  // half of the last place above the largest
  half = rest > kInfinity ? 0x7E00 : half;
  return static_cast<std::uint16_t>((rest > kInfinity ? 0 : sign) | half);
}

// Moves one element on. `grad` is as it came, cast to float.
OFFLOAD_DEVICE void adam_element(const AdamConstants& step, float grad, float& master_param,
                                 float& exp_avg, float& exp_avg_sq) {
  grad = multiply(grad, step.grad_factor);
  const float decayed = multiply(master_param, step.decay);
  const float base = step.lerp_from_grad ? grad : exp_avg;
  const float average = fused(step.lerp_weight, subtract(grad, exp_avg), base);
  const float square =
      fused(multiply(step.one_minus_beta2, grad), grad, multiply(exp_avg_sq, step.beta2));
  const float denominator = add(divide(root(square), step.root_correction), step.eps);
  master_param =
      canonical(subtract(decayed, divide(multiply(step.step_size, average), denominator)));
  exp_avg = canonical(average);
  exp_avg_sq = canonical(square);
}

}  // namespace
}  // namespace offload
