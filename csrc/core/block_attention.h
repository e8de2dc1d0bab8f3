// Attention, and scores of pairs of blocks, over chosen blocks of tokens where they lie: nothing of
// the others is read, and no sequence x sequence is ever held.
#pragma once

#include <cstddef>

#include "attention_shape.h"
#include "thread_pool.h"

namespace offload {

// [batch, heads, length, channels] in fp32 with channels side by side; strides count floats.
template <typename T>
struct Heads {
  T* data = nullptr;
  std::ptrdiff_t batch_stride = 0;
  std::ptrdiff_t head_stride = 0;
  std::ptrdiff_t row_stride = 0;

  T* row(std::size_t batch, std::size_t head, std::size_t at) const {
    return data + static_cast<std::ptrdiff_t>(batch) * batch_stride +
           static_cast<std::ptrdiff_t>(head) * head_stride +
           static_cast<std::ptrdiff_t>(at) * row_stride;
  }
};

// Each row sees the columns at and before its own position, of blocks in `columns`. `out` and `lse`
// (the logarithm of each row's sum, [batch, heads, row blocks x block_tokens]) have the rows'
// blocks side by side. A row that sees nothing gives zeros.
void block_attention(ThreadPool& pool, const AttentionShape& shape, Blocks rows, Blocks columns,
                     Heads<const float> query, Heads<const float> key, Heads<const float> value,
                     Heads<float> out, float* lse);

// Gradients of the above. `grad_query` is laid out as `out`; `grad_key` and `grad_value` have the
// columns' blocks side by side, and are added to.
void block_attention_backward(ThreadPool& pool, const AttentionShape& shape, Blocks rows,
                              Blocks columns, Heads<const float> query, Heads<const float> key,
                              Heads<const float> value, Heads<const float> out, const float* lse,
                              Heads<const float> grad_out, Heads<float> grad_query,
                              Heads<float> grad_key, Heads<float> grad_value);

// For each pair of blocks, [batch, blocks, blocks]: the largest over its pairs of tokens of the
// mean over heads of the scores' positive parts (LeMo, Eq. 2); -1 where no pair counts. Pairs of a
// query with an earlier key count; with `ahead` pairs with a later one, and all within a block.
void block_pair_scores(ThreadPool& pool, const AttentionShape& shape, bool ahead,
                       Heads<const float> query, Heads<const float> key, float* scores);

}  // namespace offload
