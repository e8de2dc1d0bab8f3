// One thread block's part of adding and taking kept rows: one row. For both compilers.
#pragma once

#include "elements.h"
#include "kept_rows_cuda.h"
#include "thread_block.h"

namespace offload {

struct NoState {};

// In place only the kept rows are passed through, and else all: that is one pass over the memory,
// where a copy before and an addition after it are two over what is kept.
inline Grid added_rows_grid(const KeptRowsArrays& given) {
  const std::size_t rows = given.out == given.whole ? given.kept : given.tokens;
  return {static_cast<unsigned>(rows), 1, 1};
}

inline Grid taken_rows_grid(const KeptRowsArrays& given) {
  return {static_cast<unsigned>(given.kept), 1, 1};
}

// Which of the kept rows stands at `token`; `kept` where none does.
OFFLOAD_KERNEL std::size_t kept_at(const KeptRowsArrays& given, std::size_t token) {
  std::size_t low = 0, high = given.kept;
  while (low < high) {
    const std::size_t middle = (low + high) / 2;
    if (static_cast<std::size_t>(given.rows[middle]) < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const bool found = low < given.kept && static_cast<std::size_t>(given.rows[low]) == token;
  return found ? low : given.kept;
}

template <typename Block>
OFFLOAD_KERNEL void add_kept_row(Block& block, const KeptRowsArrays& given, Grid at) {
  const bool in_place = given.out == given.whole;
  const std::size_t token = in_place ? static_cast<std::size_t>(given.rows[at.x]) : at.x;
  const std::size_t number = in_place ? at.x : kept_at(given, token);
  const std::size_t from = token * given.channels, part = number * given.channels;
  block.each_thread([&](unsigned thread, auto&) {
    for (std::size_t channel = thread; channel < given.channels; channel += kBlockThreads) {
      const std::size_t to = from + channel;
      // A sum with zero is not the same bits: minus zero becomes zero.
      if (number == given.kept) {
        copy(given.out, to, given.whole, to, given.dtype);
      } else {
        const float value = load(given.whole, to, given.dtype);
        const float more = load(given.part, part + channel, given.dtype);
        store(given.out, to, add(value, more), given.dtype);
      }
    }
  });
}

template <typename Block>
OFFLOAD_KERNEL void take_kept_row(Block& block, const KeptRowsArrays& given, Grid at) {
  const std::size_t from = static_cast<std::size_t>(given.rows[at.x]) * given.channels;
  block.each_thread([&](unsigned thread, auto&) {
    for (std::size_t channel = thread; channel < given.channels; channel += kBlockThreads) {
      const std::size_t to = at.x * given.channels + channel;
      copy(given.out, to, given.whole, from + channel, given.dtype);
    }
  });
}

}  // namespace offload
