// The kernels' C interface, which a library of their own exports: offload._C needs no CUDA.
#include <cuda_runtime.h>

#include "adam_cuda.h"
#include "block_attention_cuda.h"
#include "kept_rows_cuda.h"

using offload::AdamArrays;
using offload::AdamConstants;
using offload::BlockAttentionArrays;
using offload::DType;
using offload::KeptRowsArrays;

int offload_adam_update(const void* constants, const void* grad, int grad_dtype,
                        float* master_param, float* exp_avg, float* exp_avg_sq, void* param,
                        int param_dtype, std::size_t count, void* stream) {
  AdamArrays arrays;
  arrays.grad = grad;
  arrays.grad_dtype = static_cast<DType>(grad_dtype);
  arrays.master_param = master_param;
  arrays.exp_avg = exp_avg;
  arrays.exp_avg_sq = exp_avg_sq;
  arrays.param = param;
  arrays.param_dtype = static_cast<DType>(param_dtype);
  arrays.count = count;
  return offload::adam_update_cuda(*static_cast<const AdamConstants*>(constants), arrays, stream);
}

int offload_block_sums(const void* values, int dtype, std::size_t count, int squares, double* sums,
                       void* stream) {
  return offload::block_sums_cuda(values, static_cast<DType>(dtype), count, squares != 0, sums,
                                  stream);
}

const char* offload_cuda_error(int code) {
  return cudaGetErrorName(static_cast<cudaError_t>(code));
}

std::size_t offload_constants_bytes() { return sizeof(AdamConstants); }

std::size_t offload_norm_block() { return offload::kNormBlock; }

int offload_block_attention(const void* arrays, void* stream) {
  return offload::block_attention_cuda(*static_cast<const BlockAttentionArrays*>(arrays), stream);
}

int offload_block_attention_backward(const void* arrays, void* stream) {
  return offload::block_attention_backward_cuda(*static_cast<const BlockAttentionArrays*>(arrays),
                                                stream);
}

int offload_block_pair_scores(const void* arrays, int ahead, void* stream) {
  return offload::block_pair_scores_cuda(*static_cast<const BlockAttentionArrays*>(arrays),
                                         ahead != 0, stream);
}

std::size_t offload_attention_bytes() { return sizeof(BlockAttentionArrays); }

std::size_t offload_attention_most_channels() { return offload::kMostChannels; }

int offload_add_kept_rows(const void* arrays, void* stream) {
  return offload::add_kept_rows_cuda(*static_cast<const KeptRowsArrays*>(arrays), stream);
}

int offload_take_kept_rows(const void* arrays, void* stream) {
  return offload::take_kept_rows_cuda(*static_cast<const KeptRowsArrays*>(arrays), stream);
}

std::size_t offload_kept_rows_bytes() { return sizeof(KeptRowsArrays); }
