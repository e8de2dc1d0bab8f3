// For how long reads, writes, and both at once were in flight, however many of them.
#pragma once

#include <cstdint>

#include "clock.h"
#include "io_engine.h"

namespace offload {

class BusyTime {
 public:
  void begin(double now_s) {
    if (running_++ == 0) since_s_ = now_s;
  }
  void end(double now_s) {
    if (--running_ == 0) ended_s_ += now_s - since_s_;
  }
  bool running() const { return running_ != 0; }
  // Seconds with at least one begun and not ended, until now.
  double total_s(double now_s) const { return ended_s_ + (running() ? now_s - since_s_ : 0); }

 private:
  std::uint64_t running_ = 0;
  double since_s_ = 0;
  double ended_s_ = 0;
};

struct BusyStats {
  double read_s = 0;  // with at least one read in flight
  double write_s = 0;
  double mixed_s = 0;             // with at least one of each
  std::uint64_t mixed_bytes = 0;  // of both, that ended meanwhile
};

class InFlight {
 public:
  void begin(IoOp op) {
    const double now_s = wall_s();
    (op == IoOp::kRead ? reading_ : writing_).begin(now_s);
    if (reading_.running() && writing_.running() && !mixed_.running()) mixed_.begin(now_s);
  }
  // Of a request that moved `moved` bytes, or none if that is negative.
  void end(IoOp op, std::int64_t moved) {
    const double now_s = wall_s();
    (op == IoOp::kRead ? reading_ : writing_).end(now_s);
    if (!mixed_.running()) return;
    if (moved > 0) mixed_bytes_ += static_cast<std::uint64_t>(moved);
    if (!reading_.running() || !writing_.running()) mixed_.end(now_s);
  }
  BusyStats stats() const {
    const double now_s = wall_s();
    return {reading_.total_s(now_s), writing_.total_s(now_s), mixed_.total_s(now_s), mixed_bytes_};
  }

 private:
  BusyTime reading_, writing_, mixed_;
  std::uint64_t mixed_bytes_ = 0;
};

}  // namespace offload
