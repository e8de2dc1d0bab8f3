// The versions of the update, one for each kind of processor. Nothing here is inline: a translation
// unit that is compiled for a newer processor must not lend its code to the others.
#pragma once

#include <cstddef>

#include "adam_constants.h"
#include "dtype.h"

namespace offload {

// Arrays of `count` elements, each with its type's own alignment. `param` may be null: the master
// parameter is all there is. No two overlap.
struct AdamArrays {
  const void* grad = nullptr;
  DType grad_dtype = DType::kFloat32;
  float* master_param = nullptr;
  float* exp_avg = nullptr;
  float* exp_avg_sq = nullptr;
  void* param = nullptr;
  DType param_dtype = DType::kFloat32;
  std::size_t count = 0;
};

inline constexpr std::size_t kNormBlock = 4096;

struct AdamVersion {
  void (*update)(const AdamConstants& constants, const AdamArrays& arrays);
  // The sum of squares of at most kNormBlock elements, and their sum.
  double (*block_norm)(const void* values, DType dtype, std::size_t count);
  double (*block_sum)(const void* values, DType dtype, std::size_t count);
};

extern const AdamVersion kAdamScalar;
#if defined(__x86_64__)
extern const AdamVersion kAdamAvx2;
extern const AdamVersion kAdamAvx512;
#endif

}  // namespace offload
