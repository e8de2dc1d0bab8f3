// Launches the kernels of kept rows, one thread block a row: what they do is in kept_rows.h.
#include <cuda_runtime.h>

#include "kept_rows.h"

namespace offload {
namespace {

__global__ void add_rows(const KeptRowsArrays given) {
  GpuBlock<NoState> block;
  add_kept_row(block, given, this_block());
}

__global__ void take_rows(const KeptRowsArrays given) {
  GpuBlock<NoState> block;
  take_kept_row(block, given, this_block());
}

}  // namespace

int add_kept_rows_cuda(const KeptRowsArrays& arrays, void* stream) {
  const Grid grid = added_rows_grid(arrays);
  if (grid.x == 0) return cudaSuccess;
  add_rows<<<grid.x, kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(arrays);
  return cudaGetLastError();
}

int take_kept_rows_cuda(const KeptRowsArrays& arrays, void* stream) {
  const Grid grid = taken_rows_grid(arrays);
  if (grid.x == 0) return cudaSuccess;
  take_rows<<<grid.x, kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(arrays);
  return cudaGetLastError();
}

}  // namespace offload
