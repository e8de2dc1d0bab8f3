// Runs the CUDA kernels of tokens without a GPU: the same source, thread blocks and threads one
// after the other, in an order drawn anew for each phase. What a kernel reads too early, or two
// threads write at once, differs from order to order; shared memory begins as numbers that are
// none.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../../csrc/cuda/attention_backward.h"
#include "../../csrc/cuda/attention_forward.h"
#include "../../csrc/cuda/attention_launch.h"
#include "../../csrc/cuda/kept_rows.h"

namespace emulated {

using namespace offload;

constexpr int kRefused = 1;  // cudaErrorInvalidValue

template <typename State>
class Block {
 public:
  explicit Block(std::mt19937& random) : random_(random), states_(kBlockThreads) {
    if constexpr (!std::is_empty_v<State>) {
      std::memset(states_.data(), 0xFF, states_.size() * sizeof(State));
    }
    std::iota(order_.begin(), order_.end(), 0u);
  }

  template <typename Phase>
  void each_thread(const Phase& phase) {
    std::shuffle(order_.begin(), order_.end(), random_);
    for (const unsigned thread : order_) phase(thread, states_[thread]);
  }

 private:
  std::mt19937& random_;
  std::vector<State> states_;
  std::vector<unsigned> order_ = std::vector<unsigned>(kBlockThreads);
};

// Calls run(block, tile, which) for all thread blocks of a grid.
template <typename State, typename Run>
void for_each_block(Grid grid, unsigned seed, const Run& run) {
  std::mt19937 random(seed);
  std::vector<unsigned> order(std::size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned number : order) {
    const auto tile = std::make_unique<AttentionTile>();
    std::memset(tile.get(), 0xFF, sizeof *tile);
    Block<State> block(random);
    run(block, *tile, Grid{number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y});
  }
}

inline int block_attention(const BlockAttentionArrays& given, unsigned seed) {
  if (!is_taken(given) || !are_listed(given)) return kRefused;
  const Grid grid = forward_grid(given);
  with_chunks(given.shape.channels, [&](auto chunks) {
    constexpr unsigned kChunks = decltype(chunks)::value;
    for_each_block<ForwardState<kChunks>>(grid, seed, [&](auto& block, auto& tile, Grid at) {
      attend<kChunks>(block, tile, given, grid, at);
    });
  });
  return 0;
}

inline int block_attention_backward(const BlockAttentionArrays& given, unsigned seed) {
  if (!is_taken(given) || !are_listed(given)) return kRefused;
  const Grid rows = forward_grid(given), columns = key_gradient_grid(given);
  with_chunks(given.shape.channels, [&](auto chunks) {
    constexpr unsigned kChunks = decltype(chunks)::value;
    for_each_block<QueryGradientState<kChunks>>(rows, seed, [&](auto& block, auto& tile, Grid at) {
      attend_backward_to_queries<kChunks>(block, tile, given, rows, at);
    });
    for_each_block<KeyGradientState<kChunks>>(columns, seed, [&](auto& block, auto& tile, Grid at) {
      attend_backward_to_keys<kChunks>(block, tile, given, at);
    });
  });
  return 0;
}

inline int block_pair_scores(const BlockAttentionArrays& given, bool ahead, unsigned seed) {
  if (!is_taken(given) || !are_few(given)) return kRefused;
  for_each_block<PairState>(pair_grid(given), seed, [&](auto& block, auto& tile, Grid at) {
    score_pairs(block, tile, given, ahead, at);
  });
  return 0;
}

inline int add_kept_rows(const KeptRowsArrays& given, unsigned seed) {
  for_each_block<NoState>(added_rows_grid(given), seed,
                          [&](auto& block, auto&, Grid at) { add_kept_row(block, given, at); });
  return 0;
}

inline int take_kept_rows(const KeptRowsArrays& given, unsigned seed) {
  for_each_block<NoState>(taken_rows_grid(given), seed,
                          [&](auto& block, auto&, Grid at) { take_kept_row(block, given, at); });
  return 0;
}

}  // namespace emulated
