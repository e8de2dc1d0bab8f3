// The floating-point types of gradients and parameters.
#pragma once

#include <cstddef>

namespace offload {

enum class DType { kFloat32, kBFloat16, kFloat16 };

constexpr std::size_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace offload
