// Rows of kept tokens, added where they stand and taken from there, on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/dtype.h"

namespace offload {

// Of one sequence, on the device; its rows lie one after the other.
struct KeptRowsArrays {
  const void* whole = nullptr;         // [tokens, channels]
  const void* part = nullptr;          // [kept, channels], to be added
  const std::int64_t* rows = nullptr;  // [kept], ascending
  void* out = nullptr;                 // as `whole`, which it may be; or [kept, channels], taken
  std::size_t tokens = 0, kept = 0, channels = 0;
  DType dtype = DType::kFloat32;
};

// Each queues its work on `stream` (a cudaStream_t) and returns 0 or the cudaError_t of the launch.
// Each row is one's alone: nothing is added atomically, and the bits are those of one addition.
int add_kept_rows_cuda(const KeptRowsArrays& arrays, void* stream);
int take_kept_rows_cuda(const KeptRowsArrays& arrays, void* stream);

}  // namespace offload

// Of the C interface in entry.cu: see offload/device/token_kernels.py. Each returns as above.
extern "C" {
int offload_add_kept_rows(const void* arrays, void* stream);
int offload_take_kept_rows(const void* arrays, void* stream);
std::size_t offload_kept_rows_bytes();
}
