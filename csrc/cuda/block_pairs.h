// One thread block's part of the scores of pairs of blocks: a tile's worth of short blocks with
// another one's, or a pair of long ones tile by tile. For both compilers.
#pragma once

#include "attention_tile.h"

namespace offload {

struct PairState {
  Patch scores, total;
};

// How many blocks of tokens a thread block has of each side.
OFFLOAD_DEVICE unsigned blocks_of_a_tile(const AttentionShape& shape) {
  return shape.block_tokens < kTile ? kTile / static_cast<unsigned>(shape.block_tokens) : 1;
}

inline Grid pair_grid(const BlockAttentionArrays& given) {
  const std::size_t span = blocks_of_a_tile(given.shape) * given.shape.block_tokens;
  const auto side = static_cast<unsigned>((given.shape.length + span - 1) / span);
  return {side, side, static_cast<unsigned>(given.shape.batch)};
}

// Whether a pair of tokens counts, be it that one cannot see the other for what lies between.
OFFLOAD_KERNEL bool counts(const AttentionShape& shape, const AttentionTile& tile, bool ahead,
                           unsigned r, unsigned c) {
  const std::int32_t row = tile.row_at[r], column = tile.column_at[c];
  if (row == kNowhere || column == kNowhere || row == column) return false;
  const auto tokens = static_cast<std::int32_t>(shape.block_tokens);
  if (ahead ? column / tokens < row / tokens : column > row) return false;
  const bool later = row > column;
  return is_near(shape, later ? row : column, later ? column : row) &&
         tile.row_document[r] == tile.column_document[c];
}

// Notes a tile's tokens of a span: `inside` of it, from `begin` of the sequence on.
OFFLOAD_KERNEL void note_span(const AttentionShape& shape, std::size_t batch, std::size_t begin,
                              std::size_t inside, std::size_t span, unsigned thread,
                              std::int32_t* at, std::int32_t* document) {
  if (thread >= kTile) return;
  const bool there = inside + thread < span && begin + inside + thread < shape.length;
  at[thread] = there ? static_cast<std::int32_t>(begin + inside + thread) : kNowhere;
  document[thread] = document_of(shape, batch, at[thread]);
}

// Writes the largest of each pair of blocks in tile.left; `first`: nothing is there yet.
template <typename Block>
OFFLOAD_KERNEL void write_largest(Block& block, AttentionTile& tile,
                                  const BlockAttentionArrays& given, Grid at, bool first) {
  const AttentionShape& shape = given.shape;
  const unsigned per = blocks_of_a_tile(shape);
  const unsigned width =
      shape.block_tokens < kTile ? static_cast<unsigned>(shape.block_tokens) : kTile;
  const std::size_t blocks = (shape.length + shape.block_tokens - 1) / shape.block_tokens;
  // Rows first: many threads have few numbers each, and not one all of them.
  block.each_thread([&](unsigned thread, auto&) {
    for (unsigned one = thread; one < kTile * per; one += kBlockThreads) {
      const unsigned r = one / per, n = one % per;
      float most = -1.0f;
      for (unsigned c = n * width; c < (n + 1) * width; ++c) most = larger(tile.left[r][c], most);
      tile.right[r][n] = most;
    }
  });
  block.each_thread([&](unsigned thread, auto&) {
    for (unsigned pair = thread; pair < per * per; pair += kBlockThreads) {
      const std::size_t row = std::size_t{at.y} * per + pair / per;
      const std::size_t column = std::size_t{at.x} * per + pair % per;
      if (row >= blocks || column >= blocks) continue;
      float& to = given.scores[(at.z * blocks + row) * blocks + column];
      float most = first ? -1.0f : to;
      const unsigned begin = pair / per * width;
      for (unsigned r = begin; r < begin + width; ++r) {
        most = larger(tile.right[r][pair % per], most);
      }
      to = most;
    }
  });
}

// Makes the mean over heads of the scores' positive parts in tile.left; -1 where a pair counts not.
template <typename Block>
OFFLOAD_KERNEL void make_means(Block& block, AttentionTile& tile, const BlockAttentionArrays& given,
                               bool ahead, std::size_t batch) {
  const AttentionShape& shape = given.shape;
  const std::size_t group = shape.heads / shape.key_heads;
  for (std::size_t head = 0; head < shape.heads; ++head) {
    multiply(block, tile, given, {given.query, batch, head, tile.row_at},
             {given.key, batch, head / group, tile.column_at},
             [](auto& state) -> Patch& { return state.scores; });
    block.each_thread([&](unsigned, auto& state) {
      OFFLOAD_UNROLL
      for (unsigned i = 0; i < kPatch; ++i) {
        OFFLOAD_UNROLL
        for (unsigned j = 0; j < kPatch; ++j) {
          const float own = larger(state.scores.at[i][j], 0.0f);
          state.total.at[i][j] = head == 0 ? own : state.total.at[i][j] + own;
        }
      }
    });
  }
  const float share = divide(shape.scale, static_cast<float>(shape.heads));
  block.each_thread([&](unsigned thread, auto& state) {
    OFFLOAD_UNROLL
    for (unsigned i = 0; i < kPatch; ++i) {
      OFFLOAD_UNROLL
      for (unsigned j = 0; j < kPatch; ++j) {
        const unsigned r = row_of(thread, i), c = column_of(thread, j);
        const bool own = counts(shape, tile, ahead, r, c);
        tile.left[r][c] = own ? state.total.at[i][j] * share : -1.0f;
      }
    }
  });
}

template <typename Block>
OFFLOAD_KERNEL void score_pairs(Block& block, AttentionTile& tile,
                                const BlockAttentionArrays& given, bool ahead, Grid at) {
  const AttentionShape& shape = given.shape;
  const std::size_t span = blocks_of_a_tile(shape) * shape.block_tokens;
  const std::size_t row = at.y * span, column = at.x * span;
  // Of these no pair counts: -1 is all there is to write.
  const bool none = ahead ? column < row : column > row;
  for (std::size_t r = 0; r < span; r += kTile) {
    for (std::size_t c = 0; c < span; c += kTile) {
      if (none) {
        block.each_thread([&](unsigned thread, auto&) {
          for (unsigned n = thread; n < kTile * kTile; n += kBlockThreads) {
            tile.left[n / kTile][n % kTile] = -1.0f;
          }
        });
      } else {
        block.each_thread([&](unsigned thread, auto&) {
          note_span(shape, at.z, row, r, span, thread, tile.row_at, tile.row_document);
          note_span(shape, at.z, column, c, span, thread, tile.column_at, tile.column_document);
        });
        make_means(block, tile, given, ahead, at.z);
      }
      write_largest(block, tile, given, at, r == 0 && c == 0);
    }
  }
}

}  // namespace offload
