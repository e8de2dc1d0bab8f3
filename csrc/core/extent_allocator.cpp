#include "extent_allocator.h"

#include <algorithm>
#include <stdexcept>

namespace offload {

ExtentAllocator::ExtentAllocator(std::uint64_t capacity) : capacity_(capacity) {
  if (capacity != 0) free_.emplace(0, capacity);
}

std::optional<std::uint64_t> ExtentAllocator::allocate(std::uint64_t nbytes) {
  if (nbytes == 0) throw std::invalid_argument("an extent of 0 bytes cannot be allocated");
  const auto found = std::find_if(free_.begin(), free_.end(),
                                  [&](const auto& range) { return range.second >= nbytes; });
  if (found == free_.end()) return std::nullopt;
  const auto [offset, length] = *found;
  free_.erase(found);
  if (length > nbytes) free_.emplace(offset + nbytes, length - nbytes);
  used_ += nbytes;
  peak_used_ = std::max(peak_used_, used_);
  high_water_ = std::max(high_water_, offset + nbytes);
  return offset;
}

void ExtentAllocator::release(std::uint64_t offset, std::uint64_t nbytes) {
  if (nbytes > used_ || offset + nbytes > capacity_) {
    throw std::logic_error("released an extent that was never allocated");
  }
  insert_free(offset, nbytes);
  used_ -= nbytes;
}

void ExtentAllocator::grow(std::uint64_t nbytes) {
  if (nbytes == 0) return;
  insert_free(capacity_, nbytes);
  capacity_ += nbytes;
}

void ExtentAllocator::insert_free(std::uint64_t offset, std::uint64_t nbytes) {
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + nbytes > next->first) {
    throw std::logic_error("released an extent twice");
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second > offset) {
      throw std::logic_error("released an extent twice");
    }
    if (before->first + before->second == offset) {
      offset = before->first;
      nbytes += before->second;
      free_.erase(before);
    }
  }
  if (next != free_.end() && offset + nbytes == next->first) {
    nbytes += next->second;
    next = free_.erase(next);
  }
  free_.emplace_hint(next, offset, nbytes);
}

}  // namespace offload
