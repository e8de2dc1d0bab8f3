// Alignment rules shared by memory and files.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

// O_DIRECT wants addresses, offsets and lengths in multiples of the logical block (512 or 4096);
// a page satisfies every drive and is also what madvise and mmap count in.
inline constexpr std::size_t kPageBytes = 4096;
// torch allocates at multiples of 64, and kernels choose their path by that residue.
inline constexpr std::size_t kTensorAlign = 64;
inline constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

constexpr std::uint64_t align_up(std::uint64_t value, std::uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

constexpr std::uint64_t align_down(std::uint64_t value, std::uint64_t alignment) {
  return value / alignment * alignment;
}

}  // namespace offload
