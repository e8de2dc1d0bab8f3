// Elements of arrays whose type is known when the kernel runs, as floats. For both compilers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/adam_arithmetic.h"
#include "../core/dtype.h"

namespace offload {

namespace {

OFFLOAD_DEVICE float load(const void* values, std::size_t index, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(values)[index];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(values)[index];
  return dtype == DType::kBFloat16 ? from_bfloat16(bits) : from_float16(bits);
}

OFFLOAD_DEVICE void store(void* values, std::size_t index, float value, DType dtype) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(values)[index] = value;
  } else {
    static_cast<std::uint16_t*>(values)[index] =
        dtype == DType::kBFloat16 ? to_bfloat16(value) : to_float16(value);
  }
}

// Leaves every bit as it is, which a float and back would not where one is no number.
OFFLOAD_DEVICE void copy(void* to, std::size_t at, const void* from, std::size_t index,
                         DType dtype) {
  if (dtype == DType::kFloat32) {
    static_cast<std::uint32_t*>(to)[at] = static_cast<const std::uint32_t*>(from)[index];
  } else {
    static_cast<std::uint16_t*>(to)[at] = static_cast<const std::uint16_t*>(from)[index];
  }
}

}  // namespace
}  // namespace offload
