// One thread block's part of attention's gradients: those of a tile of queries, or of a tile of
// keys and values. Scores are made anew for each, so that every sum is one thread block's, in one
// order, and none is added to by two. For both compilers.
#pragma once

#include "attention_tile.h"

namespace offload {

template <unsigned kChunks>
struct QueryGradientState {
  Patch scores, grads;
  Patch query[kChunks];
};

template <unsigned kChunks>
struct KeyGradientState {
  Patch scores, grads;
  Patch key[kChunks], value[kChunks];
};

inline Grid key_gradient_grid(const BlockAttentionArrays& given) {
  const std::size_t columns = given.columns.count * given.shape.block_tokens;
  return {static_cast<unsigned>((columns + kTile - 1) / kTile),
          static_cast<unsigned>(given.shape.key_heads), static_cast<unsigned>(given.shape.batch)};
}

// Makes a thread's scores, and the gradients of what weighs values.
template <typename Block>
OFFLOAD_KERNEL void make_scores_and_grads(Block& block, AttentionTile& tile,
                                          const BlockAttentionArrays& given, std::size_t batch,
                                          std::size_t head, std::size_t key_head) {
  multiply(block, tile, given, {given.query, batch, head, tile.row_at},
           {given.key, batch, key_head, tile.column_at},
           [](auto& state) -> Patch& { return state.scores; });
  multiply(block, tile, given, {given.grad_out, batch, head, tile.row_index},
           {given.value, batch, key_head, tile.column_at},
           [](auto& state) -> Patch& { return state.grads; });
}

// Turns them into the weights and the gradients of the scores.
template <typename State>
OFFLOAD_KERNEL void turn_into_gradients(State& state, const AttentionTile& tile,
                                        const AttentionShape& shape, unsigned thread) {
  OFFLOAD_UNROLL
  for (unsigned i = 0; i < kPatch; ++i) {
    const unsigned r = row_of(thread, i);
    const float shift = tile.most[r] == kNothing ? 0.0f : tile.most[r];
    OFFLOAD_UNROLL
    for (unsigned j = 0; j < kPatch; ++j) {
      float& score = state.scores.at[i][j];
      float& grad = state.grads.at[i][j];
      const bool seen = sees(shape, tile, r, column_of(thread, j));
      score = seen ? exponential(score * shape.scale - shift) : 0.0f;
      grad = score * (grad - tile.sum[r]) * shape.scale;
    }
  }
}

// Puts a thread's part of a tile where all of its block see it.
OFFLOAD_KERNEL void share(const Patch& patch, AttentionTile& tile, unsigned thread) {
  OFFLOAD_UNROLL
  for (unsigned i = 0; i < kPatch; ++i) {
    OFFLOAD_UNROLL
    for (unsigned j = 0; j < kPatch; ++j) {
      tile.left[row_of(thread, i)][column_of(thread, j)] = patch.at[i][j];
    }
  }
}

// For each chunk of channels: loads its tile of `from`, and has `add` take it in.
template <unsigned kChunks, typename Block, typename Add>
OFFLOAD_KERNEL void for_each_chunk(Block& block, AttentionTile& tile,
                                   const BlockAttentionArrays& given, const Operand& from,
                                   const Add& add) {
  const std::size_t channels = given.shape.channels;
  OFFLOAD_UNROLL
  for (unsigned chunk = 0; chunk < kChunks; ++chunk) {
    if (chunk * kTile >= channels) continue;
    block.each_thread([&](unsigned thread, auto&) {
      load_tile(tile.right, from, given.dtype, channels, chunk, thread);
    });
    block.each_thread([&](unsigned thread, auto& state) { add(state, chunk, thread); });
  }
}

// Notes of each row of a tile what its exponentials are less, and its delta.
OFFLOAD_KERNEL void note_sums(const BlockAttentionArrays& given, std::size_t batch,
                              std::size_t head, std::size_t begin, unsigned thread,
                              AttentionTile& tile) {
  if (thread >= kTile) return;
  const std::size_t rows = given.rows.count * given.shape.block_tokens;
  const bool room = begin + thread < rows;
  const std::size_t at = (batch * given.shape.heads + head) * rows + begin + thread;
  tile.most[thread] = room ? given.lse[at] : kNothing;
  tile.sum[thread] = room ? given.delta[at] : 0.0f;
}

// Writes delta, of each row the product of what it gave and what that is worth.
template <typename Block>
OFFLOAD_KERNEL void make_deltas(Block& block, AttentionTile& tile,
                                const BlockAttentionArrays& given, std::size_t batch,
                                std::size_t head, std::size_t begin) {
  const std::size_t channels = given.shape.channels;
  const std::size_t rows = given.rows.count * given.shape.block_tokens;
  for (unsigned chunk = 0; chunk * kTile < channels; ++chunk) {
    block.each_thread([&](unsigned thread, auto&) {
      const Operand out = {given.out, batch, head, tile.row_index};
      const Operand grad = {given.grad_out, batch, head, tile.row_index};
      load_tile(tile.left, out, given.dtype, channels, chunk, thread);
      load_tile(tile.right, grad, given.dtype, channels, chunk, thread);
    });
    block.each_thread([&](unsigned thread, auto&) {
      if (thread >= kTile) return;
      float sum = chunk == 0 ? 0.0f : tile.sum[thread];
      for (unsigned k = 0; k < kTile; ++k) {
        sum = fused(tile.left[thread][k], tile.right[thread][k], sum);
      }
      tile.sum[thread] = sum;
      const bool last = (chunk + 1) * kTile >= channels;
      if (last && begin + thread < rows) {
        given.delta[(batch * given.shape.heads + head) * rows + begin + thread] = sum;
      }
    });
  }
}

// Queries' gradients, and delta, which those of keys and values are made with next.
template <unsigned kChunks, typename Block>
OFFLOAD_KERNEL void attend_backward_to_queries(Block& block, AttentionTile& tile,
                                               const BlockAttentionArrays& given, Grid grid,
                                               Grid at) {
  const AttentionShape& shape = given.shape;
  const std::size_t batch = at.z, head = at.y, key_head = head / (shape.heads / shape.key_heads);
  const std::size_t begin = std::size_t{grid.x - 1 - at.x} * kTile;  // as forward
  const Ends rows = ends_of(shape, given.rows, batch, begin);
  block.each_thread([&](unsigned thread, auto& state) {
    note_rows(given, batch, begin, thread, tile);
    OFFLOAD_UNROLL
    for (unsigned chunk = 0; chunk < kChunks; ++chunk) clear(state.query[chunk]);
  });
  make_deltas(block, tile, given, batch, head, begin);
  block.each_thread(
      [&](unsigned thread, auto&) { note_sums(given, batch, head, begin, thread, tile); });
  const std::size_t columns = given.columns.count * shape.block_tokens;
  for (std::size_t from = 0; from < columns; from += kTile) {
    if (sees_none(shape, rows, ends_of(shape, given.columns, batch, from))) continue;
    block.each_thread(
        [&](unsigned thread, auto&) { note_columns(given, batch, from, thread, tile); });
    make_scores_and_grads(block, tile, given, batch, head, key_head);
    block.each_thread([&](unsigned thread, auto& state) {
      turn_into_gradients(state, tile, shape, thread);
      share(state.grads, tile, thread);
    });
    for_each_chunk<kChunks>(block, tile, given, {given.key, batch, key_head, tile.column_at},
                            [&](auto& state, unsigned chunk, unsigned thread) {
                              add_product(state.query[chunk], tile, thread);
                            });
  }
  block.each_thread([&](unsigned thread, auto& state) {
    OFFLOAD_UNROLL
    for (unsigned chunk = 0; chunk < kChunks; ++chunk) {
      store_patch(state.query[chunk], {given.grad_query, batch, head, tile.row_at}, given.dtype,
                  shape.channels, chunk, thread);
    }
  });
}

// What one tile of rows of one head adds to the gradients of a tile of columns.
template <unsigned kChunks, typename Block>
OFFLOAD_KERNEL void add_key_gradients(Block& block, AttentionTile& tile,
                                      const BlockAttentionArrays& given, std::size_t batch,
                                      std::size_t head, std::size_t key_head, std::size_t begin) {
  block.each_thread([&](unsigned thread, auto&) {
    note_rows(given, batch, begin, thread, tile);
    note_sums(given, batch, head, begin, thread, tile);
  });
  make_scores_and_grads(block, tile, given, batch, head, key_head);
  block.each_thread([&](unsigned thread, auto& state) {
    turn_into_gradients(state, tile, given.shape, thread);
    share(state.scores, tile, thread);
  });
  for_each_chunk<kChunks>(block, tile, given, {given.grad_out, batch, head, tile.row_index},
                          [&](auto& state, unsigned chunk, unsigned thread) {
                            add_product_of_turned(state.value[chunk], tile, thread);
                          });
  block.each_thread([&](unsigned thread, auto& state) { share(state.grads, tile, thread); });
  for_each_chunk<kChunks>(block, tile, given, {given.query, batch, head, tile.row_at},
                          [&](auto& state, unsigned chunk, unsigned thread) {
                            add_product_of_turned(state.key[chunk], tile, thread);
                          });
}

// Of all heads that share a head of keys, one after the other: none is added to by two blocks.
template <unsigned kChunks, typename Block>
OFFLOAD_KERNEL void attend_backward_to_keys(Block& block, AttentionTile& tile,
                                            const BlockAttentionArrays& given, Grid at) {
  const AttentionShape& shape = given.shape;
  const std::size_t batch = at.z, key_head = at.y, group = shape.heads / shape.key_heads;
  const std::size_t from = std::size_t{at.x} * kTile;  // the first ones are seen by the most
  const Ends columns = ends_of(shape, given.columns, batch, from);
  block.each_thread([&](unsigned thread, auto& state) {
    note_columns(given, batch, from, thread, tile);
    OFFLOAD_UNROLL
    for (unsigned chunk = 0; chunk < kChunks; ++chunk) {
      clear(state.key[chunk]);
      clear(state.value[chunk]);
    }
  });
  const std::size_t rows = given.rows.count * shape.block_tokens;
  for (std::size_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    for (std::size_t begin = 0; begin < rows; begin += kTile) {
      if (sees_none(shape, ends_of(shape, given.rows, batch, begin), columns)) continue;
      add_key_gradients<kChunks>(block, tile, given, batch, head, key_head, begin);
    }
  }
  block.each_thread([&](unsigned thread, auto& state) {
    OFFLOAD_UNROLL
    for (unsigned chunk = 0; chunk < kChunks; ++chunk) {
      store_patch(state.key[chunk], {given.grad_key, batch, key_head, tile.column_at}, given.dtype,
                  shape.channels, chunk, thread);
      store_patch(state.value[chunk], {given.grad_value, batch, key_head, tile.column_at},
                  given.dtype, shape.channels, chunk, thread);
    }
  });
}

}  // namespace offload
