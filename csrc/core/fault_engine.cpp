// A real engine behind a script of misfortunes: errors, short transfers, delays, flipped bytes
// and a bandwidth limit, at chosen requests. For tests and for planning on a slower drive.
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "align.h"
#include "arena.h"
#include "io_engine.h"

namespace offload {
namespace {

using Clock = std::chrono::steady_clock;

class FaultEngine final : public IoEngine {
 public:
  FaultEngine(std::unique_ptr<IoEngine> inner, FaultPlan plan)
      : inner_(std::move(inner)), plan_(std::move(plan)), seen_(plan_.rules.size(), 0) {}

  std::string name() const override { return "fault:" + inner_->name(); }

  bool stage(const Request& request) override {
    if (plan_.discard) {
      held_.push_back({Clock::now(), {request.tag, static_cast<std::int64_t>(request.nbytes)}});
      return true;
    }
    Pending pending{Clock::now(), nullptr, nullptr, request.nbytes};
    Request passed = request;
    const FaultRule* rule = rule_for(request);
    if (rule != nullptr && rule->action == FaultRule::Action::kError) {
      held_.push_back({Clock::now(), {request.tag, -std::int64_t{rule->code}}});
      return true;
    }
    if (rule != nullptr && rule->action == FaultRule::Action::kShort) {
      pending.reported = std::min<std::uint64_t>(request.nbytes, rule->nbytes);
      if (pending.reported == 0) {
        held_.push_back({Clock::now(), {request.tag, 0}});
        return true;
      }
      // Whole pages go through, so that any length can be reported: a direct request of an odd
      // length would be refused instead of being short.
      passed.nbytes = std::min<std::size_t>(request.nbytes, align_up(pending.reported, kPageBytes));
    }
    if (rule != nullptr && rule->action == FaultRule::Action::kDelay) {
      pending.ready +=
          std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(rule->delay_s));
    }
    if (rule != nullptr && rule->action == FaultRule::Action::kCorrupt) {
      const std::size_t at = std::min<std::size_t>(rule->nbytes, request.nbytes - 1);
      if (request.op == IoOp::kRead) {
        pending.flip = request.address + at;
      } else {
        // The drive gets a spoilt copy; the caller's memory may be read by others meanwhile.
        pending.copy = std::make_unique<HostMapping>(request.nbytes);
        std::memcpy(pending.copy->data(), request.address, request.nbytes);
        pending.copy->data()[at] ^= std::byte{0x01};
        passed.address = pending.copy->data();
      }
    }
    if (!inner_->stage(passed)) {
      forget(request.op);
      return false;
    }
    if (plan_.bytes_per_s > 0) pending.ready = std::max(pending.ready, throttle(request.nbytes));
    pending_.emplace(request.tag, std::move(pending));
    return true;
  }

  void submit() override { inner_->submit(); }

  void wait(std::vector<Completion>& completions,
            std::optional<std::chrono::microseconds> limit) override {
    if (release_due(completions)) return;
    std::optional<std::chrono::microseconds> patience = limit;
    if (!held_.empty()) {
      const auto first = std::min_element(held_.begin(), held_.end(), [](auto& a, auto& b) {
                           return a.ready < b.ready;
                         })->ready;
      const auto left =
          std::chrono::duration_cast<std::chrono::microseconds>(first - Clock::now()) +
          std::chrono::microseconds(1);
      patience =
          std::max(std::chrono::microseconds(1), patience ? std::min(*patience, left) : left);
    }
    arrived_.clear();
    inner_->wait(arrived_, patience);
    for (const Completion& completion : arrived_) {
      const auto found = pending_.find(completion.tag);
      if (found == pending_.end()) continue;
      if (found->second.flip != nullptr && completion.result > 0) {
        *found->second.flip ^= std::byte{0x01};
      }
      const auto reported = static_cast<std::int64_t>(found->second.reported);
      held_.push_back(
          {found->second.ready, {completion.tag, std::min(completion.result, reported)}});
      pending_.erase(found);
    }
    release_due(completions);
  }

  void wake() override { inner_->wake(); }

  int register_memory(std::byte* address, std::size_t nbytes) override {
    return inner_->register_memory(address, nbytes);
  }

 private:
  struct Pending {
    Clock::time_point ready;
    std::byte* flip;                    // of a read, once it has arrived
    std::unique_ptr<HostMapping> copy;  // what a corrupted write really writes
    std::uint64_t reported;             // at most so many bytes are said to have been moved
  };
  struct Held {
    Clock::time_point ready;
    Completion completion;
  };

  const FaultRule* rule_for(const Request& request) {
    const FaultRule* chosen = nullptr;
    for (std::size_t i = 0; i < plan_.rules.size(); ++i) {
      const FaultRule& rule = plan_.rules[i];
      if (rule.op && *rule.op != request.op) continue;
      const std::uint64_t index = seen_[i]++;
      if (index >= rule.first && index - rule.first < rule.count && chosen == nullptr) {
        chosen = &rule;
      }
    }
    return chosen;
  }

  // The inner engine had no room, so the request will be staged again: it has not been seen.
  void forget(IoOp op) {
    for (std::size_t i = 0; i < plan_.rules.size(); ++i) {
      if (!plan_.rules[i].op || *plan_.rules[i].op == op) --seen_[i];
    }
  }

  Clock::time_point throttle(std::size_t nbytes) {
    const auto cost = std::chrono::duration_cast<Clock::duration>(
        std::chrono::duration<double>(static_cast<double>(nbytes) / plan_.bytes_per_s));
    drive_free_ = std::max(drive_free_, Clock::now()) + cost;
    return drive_free_;
  }

  bool release_due(std::vector<Completion>& completions) {
    const auto now = Clock::now();
    const auto due = std::stable_partition(held_.begin(), held_.end(),
                                           [&](const Held& held) { return held.ready > now; });
    for (auto at = due; at != held_.end(); ++at) completions.push_back(at->completion);
    const bool any = due != held_.end();
    held_.erase(due, held_.end());
    return any;
  }

  std::unique_ptr<IoEngine> inner_;
  FaultPlan plan_;
  std::vector<std::uint64_t> seen_;
  std::unordered_map<std::uint64_t, Pending> pending_;
  std::vector<Held> held_;
  std::vector<Completion> arrived_;
  Clock::time_point drive_free_{};
};

}  // namespace

std::unique_ptr<IoEngine> make_fault_engine(std::unique_ptr<IoEngine> inner, FaultPlan plan) {
  return std::make_unique<FaultEngine>(std::move(inner), std::move(plan));
}

}  // namespace offload
