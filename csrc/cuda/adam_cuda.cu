// One element a thread: the bytes decide how long it takes, and neighbours' loads are one.
#include <cuda_runtime.h>

#include <cstdint>

#include "../core/adam_arithmetic.h"
#include "adam_cuda.h"
#include "elements.h"

namespace offload {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kMostBlocks = 1u << 20;
// As in block_total(): so many sums side by side.
constexpr unsigned kLanes = 16;

template <DType grad_dtype, DType param_dtype>
__global__ void update(const AdamConstants constants, const AdamArrays arrays) {
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < arrays.count;
       i += step) {
    float param = arrays.master_param[i];
    float average = arrays.exp_avg[i];
    float square = arrays.exp_avg_sq[i];
    adam_element(constants, load(arrays.grad, i, grad_dtype), param, average, square);
    arrays.master_param[i] = param;
    arrays.exp_avg[i] = average;
    arrays.exp_avg_sq[i] = square;
    if (arrays.param != nullptr) store(arrays.param, i, param, param_dtype);
  }
}

// Sixteen threads a block of elements; the order of every sum is that of block_total().
template <DType dtype, bool squares>
__global__ void block_sums(const void* values, std::size_t count, double* sums) {
  const std::size_t block = std::size_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes;
  const unsigned lane = threadIdx.x % kLanes;
  const std::size_t begin = block * kNormBlock;
  const std::size_t end = begin + kNormBlock < count ? begin + kNormBlock : count;
  double sum = 0;
  for (std::size_t i = begin + lane; i < end; i += kLanes) {
    const double value = load(values, i, dtype);
    sum = __dadd_rn(sum, squares ? __dmul_rn(value, value) : value);
  }
  for (unsigned half = kLanes / 2; half != 0; half /= 2) {
    sum = __dadd_rn(sum, __shfl_down_sync(0xFFFFFFFF, sum, half, kLanes));
  }
  if (lane == 0 && begin < count) sums[block] = sum;
}

unsigned grid_of(std::size_t num_threads) {
  const std::size_t blocks = (num_threads + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

template <DType grad_dtype>
void launch_update(const AdamConstants& constants, const AdamArrays& arrays, cudaStream_t stream) {
  const unsigned grid = grid_of(arrays.count);
  switch (arrays.param_dtype) {
    case DType::kFloat32:
      update<grad_dtype, DType::kFloat32><<<grid, kThreads, 0, stream>>>(constants, arrays);
      break;
    case DType::kBFloat16:
      update<grad_dtype, DType::kBFloat16><<<grid, kThreads, 0, stream>>>(constants, arrays);
      break;
    case DType::kFloat16:
      update<grad_dtype, DType::kFloat16><<<grid, kThreads, 0, stream>>>(constants, arrays);
      break;
  }
}

template <DType dtype>
void launch_sums(const void* values, std::size_t count, bool squares, double* sums,
                 cudaStream_t stream) {
  const std::size_t blocks = (count + kNormBlock - 1) / kNormBlock;
  const std::size_t per_grid_block = kThreads / kLanes;
  const auto grid = static_cast<unsigned>((blocks + per_grid_block - 1) / per_grid_block);
  if (squares) {
    block_sums<dtype, true><<<grid, kThreads, 0, stream>>>(values, count, sums);
  } else {
    block_sums<dtype, false><<<grid, kThreads, 0, stream>>>(values, count, sums);
  }
}

}  // namespace

int adam_update_cuda(const AdamConstants& constants, const AdamArrays& arrays, void* stream) {
  if (arrays.count == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (arrays.grad_dtype) {
    case DType::kFloat32:
      launch_update<DType::kFloat32>(constants, arrays, on);
      break;
    case DType::kBFloat16:
      launch_update<DType::kBFloat16>(constants, arrays, on);
      break;
    case DType::kFloat16:
      launch_update<DType::kFloat16>(constants, arrays, on);
      break;
  }
  return cudaGetLastError();
}

int block_sums_cuda(const void* values, DType dtype, std::size_t count, bool squares, double* sums,
                    void* stream) {
  if (count == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32:
      launch_sums<DType::kFloat32>(values, count, squares, sums, on);
      break;
    case DType::kBFloat16:
      launch_sums<DType::kBFloat16>(values, count, squares, sums, on);
      break;
    case DType::kFloat16:
      launch_sums<DType::kFloat16>(values, count, squares, sums, on);
      break;
  }
  return cudaGetLastError();
}

}  // namespace offload
