// One thread block's part of attention: a tile of rows of one head, over all columns they see. For
// both compilers.
#pragma once

#include <cmath>

#include "attention_tile.h"

namespace offload {

// Rows' outputs stay in registers until they are whole: kChunks x kTile is as many channels as
// there are, or more.
template <unsigned kChunks>
struct ForwardState {
  Patch scores;
  Patch out[kChunks];
};

inline Grid forward_grid(const BlockAttentionArrays& given) {
  const std::size_t rows = given.rows.count * given.shape.block_tokens;
  return {static_cast<unsigned>((rows + kTile - 1) / kTile),
          static_cast<unsigned>(given.shape.heads), static_cast<unsigned>(given.shape.batch)};
}

// Turns a thread's scores into the rows' largest ones, exponentials less those, and their sums.
// Four threads have a row together, and add up in one order.
template <typename Block>
OFFLOAD_KERNEL void take_in_scores(Block& block, AttentionTile& tile, const AttentionShape& shape) {
  constexpr unsigned kOwn = kTile / kParts;
  block.each_thread([&](unsigned thread, auto& state) {
    OFFLOAD_UNROLL
    for (unsigned i = 0; i < kPatch; ++i) {
      OFFLOAD_UNROLL
      for (unsigned j = 0; j < kPatch; ++j) {
        const unsigned r = row_of(thread, i), c = column_of(thread, j);
        tile.left[r][c] = sees(shape, tile, r, c) ? state.scores.at[i][j] * shape.scale : kNothing;
      }
    }
  });
  block.each_thread([&](unsigned thread, auto&) {
    const unsigned r = thread / kParts, part = thread % kParts;
    float most = kNothing;
    for (unsigned c = 0; c < kOwn; ++c) most = larger(tile.left[r][part * kOwn + c], most);
    tile.part_most[r][part] = most;
  });
  block.each_thread([&](unsigned thread, auto&) {
    const unsigned r = thread / kParts, part = thread % kParts;
    float most = tile.most[r];
    for (unsigned other = 0; other < kParts; ++other) most = larger(tile.part_most[r][other], most);
    const float shift = most == kNothing ? 0.0f : most;
    float sum = 0;
    for (unsigned c = part * kOwn; c < (part + 1) * kOwn; ++c) {
      const float p = exponential(tile.left[r][c] - shift);
      tile.left[r][c] = p;
      sum += p;
    }
    tile.part_sum[r][part] = sum;
    if (part == 0) tile.factor[r] = exponential(tile.most[r] - shift);
  });
  block.each_thread([&](unsigned thread, auto&) {
    if (thread >= kTile) return;
    float sum = 0, most = tile.most[thread];
    for (unsigned part = 0; part < kParts; ++part) {
      sum += tile.part_sum[thread][part];
      most = larger(tile.part_most[thread][part], most);
    }
    tile.sum[thread] = tile.sum[thread] * tile.factor[thread] + sum;
    tile.most[thread] = most;
  });
}

// Takes in what the columns' values weigh by the exponentials in tile.left.
template <unsigned kChunks, typename Block>
OFFLOAD_KERNEL void take_in_values(Block& block, AttentionTile& tile,
                                   const BlockAttentionArrays& given, const Operand& value) {
  const std::size_t channels = given.shape.channels;
  OFFLOAD_UNROLL
  for (unsigned chunk = 0; chunk < kChunks; ++chunk) {
    if (chunk * kTile >= channels) continue;
    block.each_thread([&](unsigned thread, auto&) {
      load_tile(tile.right, value, given.dtype, channels, chunk, thread);
    });
    block.each_thread([&](unsigned thread, auto& state) {
      OFFLOAD_UNROLL
      for (unsigned i = 0; i < kPatch; ++i) {
        const float factor = tile.factor[row_of(thread, i)];
        OFFLOAD_UNROLL
        for (unsigned j = 0; j < kPatch; ++j) state.out[chunk].at[i][j] *= factor;
      }
      add_product(state.out[chunk], tile, thread);
    });
  }
}

// Writes the rows, and zeros for what there is room for beyond the sequence's end.
template <unsigned kChunks, typename Block>
OFFLOAD_KERNEL void finish_rows(Block& block, AttentionTile& tile,
                                const BlockAttentionArrays& given, std::size_t batch,
                                std::size_t head, std::size_t begin) {
  const std::size_t rows = given.rows.count * given.shape.block_tokens;
  block.each_thread([&](unsigned thread, auto&) {
    if (thread >= kTile) return;
    const bool room = begin + thread < rows;
    tile.row_index[thread] = room ? static_cast<std::int32_t>(begin + thread) : kNowhere;
    const float sum = tile.sum[thread];
    tile.factor[thread] = sum == 0 ? 0.0f : divide(1.0f, sum);
    const float lse = sum == 0 ? kNothing : tile.most[thread] + ::logf(sum);
    if (room) given.lse[(batch * given.shape.heads + head) * rows + begin + thread] = lse;
  });
  block.each_thread([&](unsigned thread, auto& state) {
    OFFLOAD_UNROLL
    for (unsigned chunk = 0; chunk < kChunks; ++chunk) {
      OFFLOAD_UNROLL
      for (unsigned i = 0; i < kPatch; ++i) {
        OFFLOAD_UNROLL
        for (unsigned j = 0; j < kPatch; ++j) {
          state.out[chunk].at[i][j] *= tile.factor[row_of(thread, i)];
        }
      }
      store_patch(state.out[chunk], {given.out, batch, head, tile.row_index}, given.dtype,
                  given.shape.channels, chunk, thread);
    }
  });
}

template <unsigned kChunks, typename Block>
OFFLOAD_KERNEL void attend(Block& block, AttentionTile& tile, const BlockAttentionArrays& given,
                           Grid grid, Grid at) {
  const AttentionShape& shape = given.shape;
  const std::size_t batch = at.z, head = at.y, key_head = head / (shape.heads / shape.key_heads);
  // The last rows see the most: what takes longest begins first, and none is waited for at the end.
  const std::size_t begin = std::size_t{grid.x - 1 - at.x} * kTile;
  const Ends rows = ends_of(shape, given.rows, batch, begin);
  block.each_thread([&](unsigned thread, auto& state) {
    note_rows(given, batch, begin, thread, tile);
    if (thread < kTile) {
      tile.most[thread] = kNothing;
      tile.sum[thread] = 0;
    }
    OFFLOAD_UNROLL
    for (unsigned chunk = 0; chunk < kChunks; ++chunk) clear(state.out[chunk]);
  });
  const std::size_t columns = given.columns.count * shape.block_tokens;
  for (std::size_t from = 0; from < columns; from += kTile) {
    if (sees_none(shape, rows, ends_of(shape, given.columns, batch, from))) continue;
    block.each_thread(
        [&](unsigned thread, auto&) { note_columns(given, batch, from, thread, tile); });
    multiply(block, tile, given, {given.query, batch, head, tile.row_at},
             {given.key, batch, key_head, tile.column_at},
             [](auto& state) -> Patch& { return state.scores; });
    take_in_scores(block, tile, shape);
    take_in_values<kChunks>(block, tile, given, {given.value, batch, key_head, tile.column_at});
  }
  finish_rows<kChunks>(block, tile, given, batch, head, begin);
}

}  // namespace offload
