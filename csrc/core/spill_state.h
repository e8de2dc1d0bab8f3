// What a spill's transfers share with it and may outlive it: not for use outside the spill.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "align.h"
#include "extent_allocator.h"
#include "fork_guard.h"
#include "spill.h"

namespace offload {

// How much further a spill may grow. Where nobody set its limit, it is half of what was free at the
// start, and as many bytes stay free: others on the drive go by the same rule, so that together
// they take what one of them would.
inline std::uint64_t room_to_grow(std::uint64_t limit, std::uint64_t reserved,
                                  std::optional<std::uint64_t> free_now) {
  const std::uint64_t left = limit > reserved ? limit - reserved : 0;
  if (!free_now) return left;
  return std::min(left, *free_now > limit ? align_down(*free_now - limit, kPageBytes) : 0);
}

struct Spill::Space {
  mutable std::mutex mutex;
  ExtentAllocator extents{0};
  SpillStats counters;
  std::optional<IoError> write_error;
  std::atomic<bool> write_failed{false};  // write_error is set; to be asked without the lock
  int made_in = fork_generation();
};

// A run of the file; its space returns when the extent and all transfers on it are gone.
struct Spill::FileRange {
  FileRange(std::shared_ptr<Space> of, std::uint64_t at, std::uint64_t length)
      : space(std::move(of)), offset(at), nbytes(length) {}
  FileRange(const FileRange&) = delete;
  FileRange& operator=(const FileRange&) = delete;

  std::shared_ptr<Space> space;
  std::uint64_t offset;
  std::uint64_t nbytes;

  ~FileRange() {
    if (space->made_in != fork_generation()) return;
    std::lock_guard lock(space->mutex);
    space->extents.release(offset, nbytes);
  }
};

// A write from staging: its slice comes back first, then it no longer counts as under way.
struct Spill::StagedWrite {
  StagedWrite(std::shared_ptr<Arena> of, std::shared_ptr<Slice> from)
      : arena(std::move(of)), slice(std::move(from)) {
    arena->begin_write();
  }
  ~StagedWrite() {
    slice.reset();
    arena->end_write();
  }
  StagedWrite(const StagedWrite&) = delete;
  StagedWrite& operator=(const StagedWrite&) = delete;

  std::shared_ptr<Arena> arena;
  std::shared_ptr<Slice> slice;
};

struct Extent::Shared {
  std::shared_ptr<Spill::FileRange> range;
  std::vector<std::uint32_t> checksums;  // one a block, empty when not verifying
  mutable std::mutex mutex;
  std::vector<Piece> pieces;

  ~Shared() {
    if (range->space->made_in != fork_generation()) return;
    for (const Piece& piece : pieces) {
      if (!piece.no_space) continue;
      std::lock_guard lock(range->space->mutex);
      range->space->counters.kept_bytes -= piece.nbytes;
    }
  }
};

}  // namespace offload
