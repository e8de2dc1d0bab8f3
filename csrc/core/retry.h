// Patience with a transfer that moves nothing.
#pragma once

#include <algorithm>
#include <chrono>

namespace offload {

// Completions in a row that moved nothing before a transfer is given up, a fifth of a second after
// the first: EINTR and EAGAIN are passing states, but a drive that never makes progress is broken.
inline constexpr unsigned kMaxStuck = 64;

inline std::chrono::microseconds pause_before_retry(unsigned stuck) {
  constexpr unsigned kDoublings = 5;
  return std::chrono::microseconds(100) * (1u << std::min(stuck, kDoublings));
}

}  // namespace offload
