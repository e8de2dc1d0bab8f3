// AdamW's update and norm on a GPU, with the bits of csrc/core/adam.h.
#pragma once

#include <cstddef>

#include "../core/adam_constants.h"
#include "../core/adam_versions.h"

namespace offload {

// As adam_update(), on device memory, in the order of `stream` (a cudaStream_t). Returns 0 or the
// cudaError_t of the launch.
int adam_update_cuda(const AdamConstants& constants, const AdamArrays& arrays, void* stream);

// Puts the sum, of squares or plain, of each kNormBlock elements of `values` into `sums`, both on
// the device: added up by sum_of_blocks(), once they are on the host, they are squared_norm() or
// plain_sum(). Returns as above.
int block_sums_cuda(const void* values, DType dtype, std::size_t count, bool squares, double* sums,
                    void* stream);

}  // namespace offload

// What Python calls, by its C interface: see offload/device/kernels.py. `constants` is an
// AdamConstants; the types are numbered as in DType. Each returns 0 or a cudaError_t.
extern "C" {
int offload_adam_update(const void* constants, const void* grad, int grad_dtype,
                        float* master_param, float* exp_avg, float* exp_avg_sq, void* param,
                        int param_dtype, std::size_t count, void* stream);
int offload_block_sums(const void* values, int dtype, std::size_t count, int squares, double* sums,
                       void* stream);
// Of such a number, what CUDA calls it.
const char* offload_cuda_error(int code);
// So that two builds that do not fit are told apart.
std::size_t offload_constants_bytes();
std::size_t offload_norm_block();
}
