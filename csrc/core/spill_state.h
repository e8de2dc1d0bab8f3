// What a spill's transfers share with it and may outlive it: not for use outside the spill.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "extent_allocator.h"
#include "fork_guard.h"
#include "spill.h"

namespace offload {

struct Spill::Space {
  mutable std::mutex mutex;
  ExtentAllocator extents{0};
  SpillStats counters;
  std::optional<IoError> write_error;
  int made_in = fork_generation();
};

// A run of the file; its space returns when the extent and all transfers on it are gone.
struct Spill::FileRange {
  std::shared_ptr<Space> space;
  std::uint64_t offset;
  std::uint64_t nbytes;

  ~FileRange() {
    if (space->made_in != fork_generation()) return;
    std::lock_guard lock(space->mutex);
    space->extents.release(offset, nbytes);
  }
};

struct Extent::Shared {
  std::shared_ptr<Spill::FileRange> range;
  std::vector<std::uint32_t> checksums;  // one a block, empty when not verifying
  mutable std::mutex mutex;
  std::vector<Piece> pieces;

  ~Shared() {
    if (range->space->made_in != fork_generation()) return;
    std::lock_guard lock(range->space->mutex);
    for (const Piece& piece : pieces) {
      if (piece.no_space) range->space->counters.kept_bytes -= piece.nbytes;
    }
  }
};

}  // namespace offload
