// An engine over a drive in memory that does exactly what a test says: the result of each request,
// refusals, breaking down, the order of completions, and a gate that holds them all back.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <vector>

#include "error.h"
#include "io_engine.h"

namespace offload {

inline constexpr std::uint64_t kNever = std::numeric_limits<std::uint64_t>::max();

// What to do, fixed before the engine runs. Requests are counted from 0 in order of staging.
struct Script {
  unsigned depth = 8;
  // Bytes to move (more than asked means all), or -errno.
  std::function<std::int64_t(const Request&, std::uint64_t index)> result;
  // Whether stage() says that it has no room.
  std::function<bool(std::uint64_t attempt, std::size_t in_flight)> refuses;
  bool newest_first = false;
  bool one_at_a_time = false;               // wait() returns a single completion
  std::uint64_t submit_throws_at = kNever;  // requests staged by then
  std::uint64_t wait_throws_at = kNever;
};

// The drive and what happened on it, shared with the test.
struct Drive {
  explicit Drive(std::size_t nbytes) : bytes(nbytes) {}

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::byte> bytes;
  std::vector<Request> staged;
  std::vector<std::size_t> in_flight;  // at each submit()
  bool gate_open = true;
  bool woken = false;

  void set_gate(bool open) {
    std::lock_guard lock(mutex);
    gate_open = open;
    changed.notify_all();
  }
  void wait_for_staged(std::size_t count) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return staged.size() >= count; });
  }
  std::vector<Request> requests() {
    std::lock_guard lock(mutex);
    return staged;
  }
};

class ScriptedEngine final : public IoEngine {
 public:
  ScriptedEngine(std::shared_ptr<Drive> drive, Script script)
      : drive_(std::move(drive)), script_(std::move(script)) {}

  std::string name() const override { return "scripted"; }

  bool stage(const Request& request) override {
    if (script_.refuses && script_.refuses(attempts_++, held_.size())) return false;
    if (held_.size() == script_.depth) return false;
    std::lock_guard lock(drive_->mutex);
    drive_->staged.push_back(request);
    drive_->changed.notify_all();
    held_.push_back(request);
    return true;
  }

  void submit() override {
    break_down(script_.submit_throws_at, "submit");
    std::lock_guard lock(drive_->mutex);
    drive_->in_flight.push_back(held_.size());
  }

  void wait(std::vector<Completion>& completions,
            std::optional<std::chrono::microseconds>) override {
    break_down(script_.wait_throws_at, "wait");
    std::unique_lock lock(drive_->mutex);
    drive_->changed.wait(lock,
                         [&] { return drive_->woken || (drive_->gate_open && !held_.empty()); });
    drive_->woken = false;
    if (!drive_->gate_open) return;
    if (script_.newest_first) std::reverse(held_.begin(), held_.end());
    const std::size_t count =
        script_.one_at_a_time ? std::min<std::size_t>(held_.size(), 1) : held_.size();
    for (std::size_t i = 0; i < count; ++i) completions.push_back({held_[i].tag, move(held_[i])});
    held_.erase(held_.begin(), held_.begin() + static_cast<std::ptrdiff_t>(count));
    if (script_.newest_first) std::reverse(held_.begin(), held_.end());
  }

  void wake() override {
    std::lock_guard lock(drive_->mutex);
    drive_->woken = true;
    drive_->changed.notify_all();
  }

  int register_memory(std::byte*, std::size_t) override { return 0; }

 private:
  void break_down(std::uint64_t at, const char* where) {
    if (drive_->requests().size() >= at) {
      throw IoError(EIO, std::string("scripted breakdown in ") + where, "scripted");
    }
  }

  // Moves only as many bytes as it reports, so that a queue which forgets the rest is found out.
  std::int64_t move(const Request& request) {
    std::int64_t result = static_cast<std::int64_t>(request.nbytes);
    if (script_.result) result = std::min(result, script_.result(request, moved_++));
    if (result <= 0) return result;
    std::byte* place = drive_->bytes.data() + request.offset;
    const auto nbytes = static_cast<std::size_t>(result);
    if (request.op == IoOp::kRead) {
      std::memcpy(request.address, place, nbytes);
    } else {
      std::memcpy(place, request.address, nbytes);
    }
    return result;
  }

  std::shared_ptr<Drive> drive_;
  Script script_;
  std::vector<Request> held_;
  std::uint64_t attempts_ = 0;
  std::uint64_t moved_ = 0;
};

}  // namespace offload
