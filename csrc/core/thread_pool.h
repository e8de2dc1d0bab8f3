// Threads for arithmetic, on processors of one's choice, so that an update can run beside whatever
// uses the others.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace offload {

class ThreadPool {
 public:
  // At least one thread; on `cpus` only, if any are named. Throws IoError where the system refuses
  // a thread or a processor.
  explicit ThreadPool(unsigned num_threads, const std::vector<int>& cpus = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls work(0) to work(count - 1), each once, in any order, and returns when all have returned.
  // A single one is called on the caller's thread. The first exception is thrown here, after the
  // rest was left out. One caller at a time; others wait. Throws in a forked child, which has no
  // threads.
  void run(std::size_t count, const std::function<void(std::size_t)>& work);

  unsigned num_threads() const { return static_cast<unsigned>(threads_.size()); }

 private:
  void serve();
  void stop();
  void take_part(std::unique_lock<std::mutex>& lock);

  const int fork_generation_;
  std::mutex caller_mutex_;

  std::mutex mutex_;
  std::condition_variable begun_;
  std::condition_variable ended_;
  const std::function<void(std::size_t)>* work_ = nullptr;
  std::size_t next_ = 0;
  std::size_t count_ = 0;
  std::size_t running_ = 0;
  std::exception_ptr error_;
  bool stopping_ = false;

  std::vector<std::thread> threads_;  // last: they use all of the above
};

}  // namespace offload
