// AdamW on the host: one pass over gradient, master parameter and moments, the parameter rounded to
// its own type on the way out. All versions give the same bits: see adam_arithmetic.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "adam_constants.h"
#include "adam_versions.h"
#include "dtype.h"
#include "thread_pool.h"

namespace offload {

struct AdamSettings {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.01;
  bool maximize = false;
};

// The shared factors of step number `step`, from 1 on, made as torch.optim.AdamW makes them: in
// double precision, rounded once. `grad_scale` is divided out of the gradients, `clip` multiplied.
AdamConstants make_adam_constants(const AdamSettings& settings, std::uint64_t step,
                                  double grad_scale, double clip);

// The version for this processor.
const AdamVersion& best_adam_version();

// Updates all of `arrays` on the threads of `pool`. Denormal numbers are kept whatever the calling
// thread's flush mode is, which is left as it was.
void adam_update(ThreadPool& pool, const AdamConstants& constants, const AdamArrays& arrays,
                 const AdamVersion& version = best_adam_version());

// The sum of squares of an array, in double precision: in a fixed order whatever the threads or
// vectors, so that it is the same everywhere. Infinite or NaN if an element is, and only then.
double squared_norm(ThreadPool& pool, const void* values, DType dtype, std::size_t count,
                    const AdamVersion& version = best_adam_version());

// The sum of an array, as the sum of squares is made.
double plain_sum(ThreadPool& pool, const void* values, DType dtype, std::size_t count,
                 const AdamVersion& version = best_adam_version());

// The sum of `sums`, one for each kNormBlock elements, in that order; they are overwritten.
double sum_of_blocks(std::vector<double>& sums);

// Its name: "avx512", "avx2" or "scalar".
const char* adam_path();

// Versions by name, so that a test can compare those this processor has; null where it has not.
const AdamVersion* adam_version(const char* path);

}  // namespace offload
