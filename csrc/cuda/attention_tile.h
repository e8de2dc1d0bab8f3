// What the kernels of attention share: the tiles that a thread block holds, which of their tokens
// see which, and products of them. For both compilers.
//
// A tile is of kTile listed rows, kTile listed columns or kTile channels, wherever blocks begin and
// end in it: how many tokens a block has changes nothing of how well the processor is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "../core/exponential.h"
#include "block_attention_cuda.h"
#include "elements.h"
#include "thread_block.h"

namespace offload {

inline constexpr unsigned kTile = 64;
// Threads stand in a square, and each has every kSide-th row and column of a tile: neighbours read
// neighbouring banks of the shared memory.
inline constexpr unsigned kSide = 16;
inline constexpr unsigned kPatch = kTile / kSide;
// How many threads have a row of scores together.
inline constexpr unsigned kParts = kBlockThreads / kTile;
static_assert(kSide * kSide == kBlockThreads);

inline constexpr float kNothing = -std::numeric_limits<float>::infinity();
inline constexpr std::int32_t kNowhere = -1;

// One more than a tile's columns: those of a column lie in different banks, too.
using TileValues = float[kTile][kTile + 1];

// What a thread has of a tile.
struct Patch {
  float at[kPatch][kPatch];
};

// A thread block's shared memory: less than the 48 KiB that every GPU has without being asked.
struct AttentionTile {
  TileValues left, right;
  // Where the tokens stand in their sequence, and of which document they are.
  std::int32_t row_at[kTile], column_at[kTile];
  std::int32_t row_document[kTile], column_document[kTile];
  // Where the rows lie among those side by side.
  std::int32_t row_index[kTile];
  // Of each row: forward its largest score and its sum, backward its logarithm of that and delta.
  float most[kTile], sum[kTile], factor[kTile];
  float part_most[kTile][kParts], part_sum[kTile][kParts];
};

// Rows of a tensor that one thread block looks at; those at kNowhere are zeros.
struct Operand {
  const HeadRows& rows;
  std::size_t batch;
  std::size_t head;
  const std::int32_t* at;
};

struct Ends {
  std::int32_t first, last;
};

OFFLOAD_KERNEL unsigned row_of(unsigned thread, unsigned i) { return thread / kSide + kSide * i; }
OFFLOAD_KERNEL unsigned column_of(unsigned thread, unsigned j) {
  return thread % kSide + kSide * j;
}

OFFLOAD_KERNEL std::size_t offset_of(const HeadRows& rows, std::size_t batch, std::size_t head,
                                     std::int64_t row) {
  return static_cast<std::size_t>(static_cast<std::int64_t>(batch) * rows.batch_stride +
                                  static_cast<std::int64_t>(head) * rows.head_stride +
                                  row * rows.row_stride);
}

OFFLOAD_KERNEL float larger(float a, float b) { return a > b ? a : b; }

OFFLOAD_KERNEL void clear(Patch& patch) {
  OFFLOAD_UNROLL
  for (unsigned i = 0; i < kPatch; ++i) {
    OFFLOAD_UNROLL
    for (unsigned j = 0; j < kPatch; ++j) patch.at[i][j] = 0;
  }
}

// ---- which tokens, and who sees whom -----------------------------------------------------------

// Where the `index`-th token of listed blocks stands, be that beyond the sequence's end.
OFFLOAD_KERNEL std::int32_t stands_at(const AttentionShape& shape, const Blocks& blocks,
                                      std::size_t batch, std::size_t index) {
  // The host has checked that all of these are numbers of 31 bits, which divide faster.
  const auto tokens = static_cast<std::uint32_t>(shape.block_tokens);
  const auto at = static_cast<std::uint32_t>(index);
  const std::int32_t number = blocks.numbers[batch * blocks.count + at / tokens];
  return number * static_cast<std::int32_t>(tokens) + static_cast<std::int32_t>(at % tokens);
}

// Of a tile from `begin` on; tokens ascend.
OFFLOAD_KERNEL Ends ends_of(const AttentionShape& shape, const Blocks& blocks, std::size_t batch,
                            std::size_t begin) {
  const std::size_t all = blocks.count * shape.block_tokens;
  const std::size_t end = begin + kTile < all ? begin + kTile : all;
  return {stands_at(shape, blocks, batch, begin), stands_at(shape, blocks, batch, end - 1)};
}

// Whether rows see none of the columns, by position alone.
OFFLOAD_KERNEL bool sees_none(const AttentionShape& shape, Ends rows, Ends columns) {
  if (columns.first > rows.last) return true;
  return shape.window != 0 && rows.first > columns.last &&
         static_cast<std::size_t>(rows.first - columns.last) >= shape.window;
}

OFFLOAD_KERNEL std::int32_t document_of(const AttentionShape& shape, std::size_t batch,
                                        std::int32_t at) {
  if (shape.documents == nullptr || at == kNowhere) return 0;
  return shape.documents[batch * shape.length + static_cast<std::size_t>(at)];
}

// Notes where a tile's tokens stand, one a thread.
OFFLOAD_KERNEL void note_places(const AttentionShape& shape, const Blocks& blocks,
                                std::size_t batch, std::size_t begin, unsigned thread,
                                std::int32_t* at, std::int32_t* document) {
  if (thread >= kTile) return;
  std::int32_t found = kNowhere;
  if (begin + thread < blocks.count * shape.block_tokens) {
    found = stands_at(shape, blocks, batch, begin + thread);
    if (static_cast<std::size_t>(found) >= shape.length) found = kNowhere;
  }
  at[thread] = found;
  document[thread] = document_of(shape, batch, found);
}

OFFLOAD_KERNEL void note_rows(const BlockAttentionArrays& given, std::size_t batch,
                              std::size_t begin, unsigned thread, AttentionTile& tile) {
  note_places(given.shape, given.rows, batch, begin, thread, tile.row_at, tile.row_document);
  if (thread < kTile) {
    const bool there = tile.row_at[thread] != kNowhere;
    tile.row_index[thread] = there ? static_cast<std::int32_t>(begin + thread) : kNowhere;
  }
}

OFFLOAD_KERNEL void note_columns(const BlockAttentionArrays& given, std::size_t batch,
                                 std::size_t begin, unsigned thread, AttentionTile& tile) {
  note_places(given.shape, given.columns, batch, begin, thread, tile.column_at,
              tile.column_document);
}

OFFLOAD_KERNEL bool is_near(const AttentionShape& shape, std::int32_t late, std::int32_t early) {
  return shape.window == 0 || static_cast<std::size_t>(late - early) < shape.window;
}

OFFLOAD_KERNEL bool sees(const AttentionShape& shape, const AttentionTile& tile, unsigned row,
                         unsigned column) {
  const std::int32_t own = tile.row_at[row], other = tile.column_at[column];
  if (other == kNowhere || other > own) return false;
  return is_near(shape, own, other) && tile.row_document[row] == tile.column_document[column];
}

// ---- products ----------------------------------------------------------------------------------

// Neighbouring threads read neighbouring channels. What is beyond is zero, and adds nothing.
OFFLOAD_KERNEL void load_tile(TileValues& to, const Operand& from, DType dtype,
                              std::size_t channels, unsigned chunk, unsigned thread) {
  for (unsigned at = thread; at < kTile * kTile; at += kBlockThreads) {
    const unsigned row = at / kTile, inside = at % kTile;
    const std::size_t channel = std::size_t{chunk} * kTile + inside;
    const bool there = from.at[row] != kNowhere && channel < channels;
    to[row][inside] =
        there ? load(from.rows.data,
                     offset_of(from.rows, from.batch, from.head, from.at[row]) + channel, dtype)
              : 0.0f;
  }
}

// patch[r][c] += sum over k of first(r, k) * second(k, c).
template <typename First, typename Second>
OFFLOAD_KERNEL void add_sums(Patch& patch, unsigned thread, const First& first,
                             const Second& second) {
  for (unsigned k = 0; k < kTile; ++k) {
    float of_row[kPatch], of_column[kPatch];
    OFFLOAD_UNROLL
    for (unsigned i = 0; i < kPatch; ++i) {
      of_row[i] = first(row_of(thread, i), k);
      of_column[i] = second(k, column_of(thread, i));
    }
    OFFLOAD_UNROLL
    for (unsigned i = 0; i < kPatch; ++i) {
      OFFLOAD_UNROLL
      for (unsigned j = 0; j < kPatch; ++j) {
        patch.at[i][j] = fused(of_row[i], of_column[j], patch.at[i][j]);
      }
    }
  }
}

// Adds left x right.
OFFLOAD_KERNEL void add_product(Patch& patch, const AttentionTile& tile, unsigned thread) {
  add_sums(
      patch, thread, [&](unsigned r, unsigned k) { return tile.left[r][k]; },
      [&](unsigned k, unsigned c) { return tile.right[k][c]; });
}

// Adds left x right, turned.
OFFLOAD_KERNEL void add_product_with_turned(Patch& patch, const AttentionTile& tile,
                                            unsigned thread) {
  add_sums(
      patch, thread, [&](unsigned r, unsigned k) { return tile.left[r][k]; },
      [&](unsigned k, unsigned c) { return tile.right[c][k]; });
}

// Adds left, turned, x right.
OFFLOAD_KERNEL void add_product_of_turned(Patch& patch, const AttentionTile& tile,
                                          unsigned thread) {
  add_sums(
      patch, thread, [&](unsigned r, unsigned k) { return tile.left[k][r]; },
      [&](unsigned k, unsigned c) { return tile.right[k][c]; });
}

// The products of rows of `left` with rows of `right` over all channels, into what `patch_of` names
// of a thread's state.
template <typename Block, typename PatchOf>
OFFLOAD_KERNEL void multiply(Block& block, AttentionTile& tile, const BlockAttentionArrays& given,
                             const Operand& left, const Operand& right, const PatchOf& patch_of) {
  const std::size_t channels = given.shape.channels;
  for (unsigned chunk = 0; chunk * kTile < channels; ++chunk) {
    block.each_thread([&](unsigned thread, auto& state) {
      if (chunk == 0) clear(patch_of(state));
      load_tile(tile.left, left, given.dtype, channels, chunk, thread);
      load_tile(tile.right, right, given.dtype, channels, chunk, thread);
    });
    block.each_thread([&](unsigned thread, auto& state) {
      add_product_with_turned(patch_of(state), tile, thread);
    });
  }
}

// Writes a thread's patch of a chunk of channels, of rows at `at` that are there.
OFFLOAD_KERNEL void store_patch(const Patch& patch, const Operand& to, DType dtype,
                                std::size_t channels, unsigned chunk, unsigned thread) {
  OFFLOAD_UNROLL
  for (unsigned i = 0; i < kPatch; ++i) {
    const std::int32_t at = to.at[row_of(thread, i)];
    if (at == kNowhere) continue;
    const std::size_t begin = offset_of(to.rows, to.batch, to.head, at);
    OFFLOAD_UNROLL
    for (unsigned j = 0; j < kPatch; ++j) {
      const std::size_t channel = std::size_t{chunk} * kTile + column_of(thread, j);
      if (channel < channels) store(to.rows.data, begin + channel, patch.at[i][j], dtype);
    }
  }
}

}  // namespace offload
