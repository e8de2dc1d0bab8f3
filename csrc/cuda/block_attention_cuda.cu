// Launches the kernels of attention over blocks: what they do is in attention_forward.h,
// attention_backward.h and block_pairs.h.
#include <cuda_runtime.h>

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_launch.h"

namespace offload {
namespace {

template <unsigned kChunks>
__global__ void __launch_bounds__(kBlockThreads)
    forward(const __grid_constant__ BlockAttentionArrays given, const Grid grid) {
  __shared__ AttentionTile tile;
  GpuBlock<ForwardState<kChunks>> block;
  attend<kChunks>(block, tile, given, grid, this_block());
}

template <unsigned kChunks>
__global__ void __launch_bounds__(kBlockThreads)
    backward_to_queries(const __grid_constant__ BlockAttentionArrays given, const Grid grid) {
  __shared__ AttentionTile tile;
  GpuBlock<QueryGradientState<kChunks>> block;
  attend_backward_to_queries<kChunks>(block, tile, given, grid, this_block());
}

template <unsigned kChunks>
__global__ void __launch_bounds__(kBlockThreads)
    backward_to_keys(const __grid_constant__ BlockAttentionArrays given) {
  __shared__ AttentionTile tile;
  GpuBlock<KeyGradientState<kChunks>> block;
  attend_backward_to_keys<kChunks>(block, tile, given, this_block());
}

__global__ void __launch_bounds__(kBlockThreads)
    pair_scores(const __grid_constant__ BlockAttentionArrays given, const bool ahead) {
  __shared__ AttentionTile tile;
  GpuBlock<PairState> block;
  score_pairs(block, tile, given, ahead, this_block());
}

dim3 blocks_of(Grid grid) { return {grid.x, grid.y, grid.z}; }

}  // namespace

int block_attention_cuda(const BlockAttentionArrays& arrays, void* stream) {
  if (!is_taken(arrays) || !are_listed(arrays)) return cudaErrorInvalidValue;
  if (arrays.shape.batch == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  const Grid grid = forward_grid(arrays);
  with_chunks(arrays.shape.channels, [&](auto chunks) {
    forward<decltype(chunks)::value><<<blocks_of(grid), kBlockThreads, 0, on>>>(arrays, grid);
  });
  return cudaGetLastError();
}

int block_attention_backward_cuda(const BlockAttentionArrays& arrays, void* stream) {
  if (!is_taken(arrays) || !are_listed(arrays)) return cudaErrorInvalidValue;
  if (arrays.shape.batch == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  const Grid rows = forward_grid(arrays), columns = key_gradient_grid(arrays);
  // One after the other: the second reads the deltas that the first has written.
  with_chunks(arrays.shape.channels, [&](auto chunks) {
    constexpr unsigned kChunks = decltype(chunks)::value;
    backward_to_queries<kChunks><<<blocks_of(rows), kBlockThreads, 0, on>>>(arrays, rows);
    backward_to_keys<kChunks><<<blocks_of(columns), kBlockThreads, 0, on>>>(arrays);
  });
  return cudaGetLastError();
}

int block_pair_scores_cuda(const BlockAttentionArrays& arrays, bool ahead, void* stream) {
  if (!is_taken(arrays) || !are_few(arrays)) return cudaErrorInvalidValue;
  if (arrays.shape.batch == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  pair_scores<<<blocks_of(pair_grid(arrays)), kBlockThreads, 0, on>>>(arrays, ahead);
  return cudaGetLastError();
}

}  // namespace offload
