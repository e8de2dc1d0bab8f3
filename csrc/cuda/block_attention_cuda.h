// Attention of blocks of rows over blocks of columns, and scores of pairs of blocks, on a GPU: what
// csrc/core/block_attention.h has on the host. For both compilers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/attention_shape.h"
#include "../core/dtype.h"

namespace offload {

// The accumulators of 64 rows of so many channels are what the registers of a block hold.
inline constexpr std::size_t kMostChannels = 256;

// [batch, heads, rows, channels], channels side by side; strides count elements.
struct HeadRows {
  void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t row_stride = 0;
};

// All on the device, numbers of blocks and documents too. Sums are in fp32 whatever `dtype`, which
// all but the floats are of.
struct BlockAttentionArrays {
  AttentionShape shape;
  Blocks rows, columns;
  DType dtype = DType::kFloat32;
  // Of whole sequences.
  HeadRows query, key, value;
  // The rows' blocks side by side, and [batch, heads, row blocks x block_tokens]: each row's
  // logarithm of its sum. Beyond a sequence's end they are zero, and minus infinity.
  HeadRows out;
  float* lse = nullptr;
  // The backward's. `grad_out` is as `out` and nothing of it is read beyond a sequence's end;
  // `delta` is room for as much as `lse`.
  HeadRows grad_out;
  float* delta = nullptr;
  // Of whole sequences: written where the rows and columns are and nowhere else.
  HeadRows grad_query, grad_key, grad_value;
  // [batch, blocks, blocks].
  float* scores = nullptr;
};

// Each queues its work on `stream` (a cudaStream_t) and returns 0 or the cudaError_t of the launch:
// cudaErrorInvalidValue for a shape that is_taken() refuses. No sum depends on the order in which
// thread blocks run: the same input gives the same bits.
int block_attention_cuda(const BlockAttentionArrays& arrays, void* stream);
int block_attention_backward_cuda(const BlockAttentionArrays& arrays, void* stream);
// Of `query` and `key`, as block_pair_scores().
int block_pair_scores_cuda(const BlockAttentionArrays& arrays, bool ahead, void* stream);

}  // namespace offload

// Of the C interface in entry.cu: see offload/device/token_kernels.py. Each returns as above.
extern "C" {
int offload_block_attention(const void* arrays, void* stream);
int offload_block_attention_backward(const void* arrays, void* stream);
int offload_block_pair_scores(const void* arrays, int ahead, void* stream);
// So that two builds that do not fit are told apart.
std::size_t offload_attention_bytes();
std::size_t offload_attention_most_channels();
}
