// What attention on a GPU takes, and which of its kernels for how many channels. For both
// compilers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "attention_tile.h"
#include "block_pairs.h"

namespace offload {

// A grid has no more thread blocks than these in its second and third direction.
inline constexpr std::size_t kMostInGrid = 65535;

inline bool is_taken(const BlockAttentionArrays& given) {
  const AttentionShape& shape = given.shape;
  if (shape.channels == 0 || shape.channels > kMostChannels) return false;
  if (shape.key_heads == 0 || shape.heads == 0 || shape.heads % shape.key_heads != 0) return false;
  if (shape.batch > kMostInGrid || shape.heads > kMostInGrid) return false;
  // Places are numbers of 31 bits, up to the end of the last block.
  constexpr std::size_t most = std::numeric_limits<std::int32_t>::max() / 2;
  if (shape.length == 0 || shape.length > most) return false;
  return shape.block_tokens != 0 && shape.block_tokens <= most;
}

inline bool are_listed(const BlockAttentionArrays& given) {
  // No block twice: as many tokens as there are, and what the last block lacks.
  const std::size_t most = given.shape.length + given.shape.block_tokens;
  return given.rows.count != 0 && given.columns.count != 0 &&
         given.rows.count * given.shape.block_tokens < most &&
         given.columns.count * given.shape.block_tokens < most;
}

inline bool are_few(const BlockAttentionArrays& given) { return pair_grid(given).y <= kMostInGrid; }

// Calls launch(chunks), a number that the compiler knows, for kernels of so many tiles of channels.
template <typename Launch>
void with_chunks(std::size_t channels, const Launch& launch) {
  if (channels <= kTile) {
    launch(std::integral_constant<unsigned, 1>());
  } else if (channels <= 2 * kTile) {
    launch(std::integral_constant<unsigned, 2>());
  } else {
    launch(std::integral_constant<unsigned, kMostChannels / kTile>());
  }
}

}  // namespace offload
