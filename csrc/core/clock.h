// The clocks that time is accounted by, in seconds.
#pragma once

#include <time.h>

#include <chrono>

namespace offload {

// CPU time of the calling thread. A system call: too dear around a small copy.
inline double thread_cpu_s() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

inline double wall_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace offload
