// e^x as attention takes it, on every processor: for both compilers, and with the same bits.
#pragma once

#include <cstdint>

#include "adam_arithmetic.h"

namespace offload {

namespace {

// e^x for x <= 0, exactly 1 at 0 and 0 from -87 down; within 2 units in the last place. By
// Cephes' polynomial, so that a compiler makes vectors of it. A NaN stays one.
OFFLOAD_DEVICE float exponential(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  const float n = (bounded * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  const std::int32_t power = n == n ? static_cast<std::int32_t>(n) : 0;
  return x < -87.0f ? 0.0f : p * float_of(static_cast<std::uint32_t>(power + 127) << 23);
}

}  // namespace
}  // namespace offload
