// pread and pwrite on a few threads: what every kernel and container allows, and the plain
// version that the io_uring engine is compared with.
#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#include "error.h"
#include "io_engine.h"

namespace offload {
namespace {

class PosixEngine final : public IoEngine {
 public:
  PosixEngine(unsigned depth, unsigned threads) : depth_(depth) {
    try {
      for (unsigned i = 0; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      stop();  // a thread that is not joined ends the process
      throw IoError(error.code().value(), "the system refuses another thread for I/O", "posix");
    }
  }

  ~PosixEngine() override { stop(); }

  std::string name() const override { return "posix"; }

  bool stage(const Request& request) override {
    if (in_flight_ == depth_) return false;
    ++in_flight_;
    staged_.push_back(request);
    return true;
  }

  void submit() override {
    if (staged_.empty()) return;
    {
      std::lock_guard lock(mutex_);
      queued_.insert(queued_.end(), staged_.begin(), staged_.end());
    }
    if (staged_.size() == 1) {
      work_ready_.notify_one();
    } else {
      work_ready_.notify_all();
    }
    staged_.clear();
  }

  void wait(std::vector<Completion>& completions,
            std::optional<std::chrono::microseconds> limit) override {
    std::unique_lock lock(mutex_);
    const auto ready = [this] { return !done_.empty() || woken_; };
    if (limit) {
      done_ready_.wait_for(lock, *limit, ready);
    } else {
      done_ready_.wait(lock, ready);
    }
    woken_ = false;
    in_flight_ -= static_cast<unsigned>(done_.size());
    completions.insert(completions.end(), done_.begin(), done_.end());
    done_.clear();
  }

  void wake() override {
    {
      std::lock_guard lock(mutex_);
      woken_ = true;
    }
    done_ready_.notify_one();
  }

  int register_memory(std::byte*, std::size_t) override { return EOPNOTSUPP; }

 private:
  void stop() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_ready_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  static std::int64_t transfer(const Request& request) {
    const auto offset = static_cast<off_t>(request.offset);
    const ssize_t moved = request.op == IoOp::kRead
                              ? ::pread(request.fd, request.address, request.nbytes, offset)
                              : ::pwrite(request.fd, request.address, request.nbytes, offset);
    return moved >= 0 ? moved : -errno;
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_ready_.wait(lock, [this] { return stopping_ || !queued_.empty(); });
      if (queued_.empty()) return;
      const Request request = queued_.front();
      queued_.pop_front();
      lock.unlock();
      const std::int64_t result = transfer(request);
      lock.lock();
      done_.push_back({request.tag, result});
      done_ready_.notify_one();
    }
  }

  unsigned depth_;
  unsigned in_flight_ = 0;       // the owner's
  std::vector<Request> staged_;  // the owner's
  std::mutex mutex_;
  std::condition_variable work_ready_;
  std::condition_variable done_ready_;
  std::deque<Request> queued_;
  std::vector<Completion> done_;
  bool woken_ = false;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace

std::unique_ptr<IoEngine> make_posix_engine(unsigned depth, unsigned threads) {
  return std::make_unique<PosixEngine>(depth, threads);
}

}  // namespace offload
