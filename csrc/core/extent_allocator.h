// Address ranges of a bounded space, handed out first fit and coalesced when they come back. It
// knows no memory and no file: the arena and the spill file each put one on top of theirs.
// Not thread-safe; its owner locks.
#pragma once

#include <cstdint>
#include <map>
#include <optional>

namespace offload {

class ExtentAllocator {
 public:
  explicit ExtentAllocator(std::uint64_t capacity);

  // The lowest free range of `nbytes`, or nothing when no single free range is that long.
  std::optional<std::uint64_t> allocate(std::uint64_t nbytes);
  // Gives back exactly what allocate() handed out.
  void release(std::uint64_t offset, std::uint64_t nbytes);
  // Adds [capacity, capacity + nbytes) to the space.
  void grow(std::uint64_t nbytes);

  std::uint64_t capacity() const { return capacity_; }
  std::uint64_t used() const { return used_; }
  std::uint64_t peak_used() const { return peak_used_; }
  // One past the highest byte ever handed out: what was touched.
  std::uint64_t high_water() const { return high_water_; }
  void forget_high_water() { high_water_ = 0; }
  std::size_t free_ranges() const { return free_.size(); }

 private:
  void insert_free(std::uint64_t offset, std::uint64_t nbytes);

  std::map<std::uint64_t, std::uint64_t> free_;  // offset -> length
  std::uint64_t capacity_;
  std::uint64_t used_ = 0;
  std::uint64_t peak_used_ = 0;
  std::uint64_t high_water_ = 0;
};

}  // namespace offload
