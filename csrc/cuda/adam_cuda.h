// AdamW's update and norm on a GPU, with the bits of csrc/core/adam.h.
#pragma once

#include <cstddef>

#include "../core/adam_constants.h"
#include "../core/adam_versions.h"

namespace offload {

// As adam_update(), on device memory, in the order of `stream` (a cudaStream_t). Returns 0 or the
// cudaError_t of the launch.
int adam_update_cuda(const AdamConstants& constants, const AdamArrays& arrays, void* stream);

// Puts the sum of squares of each kNormBlock elements of `values` into `sums`, both on the device:
// added up by sum_of_blocks(), once they are on the host, they are squared_norm(). Returns as
// above.
int block_norms_cuda(const void* values, DType dtype, std::size_t count, double* sums,
                     void* stream);

}  // namespace offload
