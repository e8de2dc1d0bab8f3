// How long something was going on, however much of it at once.
#pragma once

#include <cstdint>

#include "clock.h"

namespace offload {

class BusyTime {
 public:
  void begin() {
    if (running_++ == 0) since_s_ = wall_s();
  }
  void end() {
    if (--running_ == 0) ended_s_ += wall_s() - since_s_;
  }
  // Seconds with at least one begun and not ended, until now.
  double total_s() const { return running_ == 0 ? ended_s_ : ended_s_ + (wall_s() - since_s_); }

 private:
  std::uint64_t running_ = 0;
  double since_s_ = 0;
  double ended_s_ = 0;
};

}  // namespace offload
