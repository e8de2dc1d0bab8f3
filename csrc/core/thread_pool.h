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

#include "fork_guard.h"

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
  // A single one is called on the caller's thread, unless the pool has CPUs of its own. The first
  // exception is thrown here, after the rest was left out. One caller at a time, others wait, and
  // `work` must not call this. Throws in a forked child, which has no threads.
  void run(std::size_t count, const std::function<void(std::size_t)>& work);

  unsigned num_threads() const { return num_threads_; }

 private:
  struct State {
    std::mutex caller_mutex;
    std::mutex mutex;
    std::condition_variable begun;
    std::condition_variable ended;
    const std::function<void(std::size_t)>* work = nullptr;
    std::size_t next = 0;
    std::size_t count = 0;
    std::size_t running = 0;
    std::exception_ptr error;
    bool stopping = false;
    std::vector<std::thread> threads;
  };

  static void serve(State& state);
  static void take_part(State& state, std::unique_lock<std::mutex>& lock);
  void stop();

  const int fork_generation_;
  const unsigned num_threads_;
  const bool bound_;
  ParentOwned<State> state_;
};

}  // namespace offload
