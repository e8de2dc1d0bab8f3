#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "error.h"
#include "fork_guard.h"

namespace offload {
namespace {

void bind_to(std::thread& thread, const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::string names;
  for (const int cpu : cpus) {
    if (cpu < 0 || cpu >= CPU_SETSIZE) {
      throw std::invalid_argument("there is no CPU " + std::to_string(cpu));
    }
    CPU_SET(cpu, &set);
    names += ' ' + std::to_string(cpu);
  }
  const int code = ::pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
  if (code != 0) throw IoError(code, "threads cannot run on CPUs" + names, "");
}

}  // namespace

ThreadPool::ThreadPool(unsigned num_threads, const std::vector<int>& cpus)
    : fork_generation_(fork_generation()) {
  if (num_threads == 0) throw std::invalid_argument("num_threads must be at least 1, not 0");
  threads_.reserve(num_threads);
  try {
    for (unsigned index = 0; index < num_threads; ++index) {
      threads_.push_back(start_thread([this] { serve(); }, ""));
      if (!cpus.empty()) bind_to(threads_.back(), cpus);
    }
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (fork_generation_ == fork_generation()) {
    stop();
  } else {
    for (std::thread& thread : threads_) thread.detach();  // they are in the parent only
  }
}

void ThreadPool::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  begun_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

// Takes indices until none is left.
void ThreadPool::take_part(std::unique_lock<std::mutex>& lock) {
  ++running_;
  while (next_ < count_) {
    const std::size_t index = next_++;
    const auto* work = work_;
    lock.unlock();
    std::exception_ptr error;
    try {
      (*work)(index);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error) {
      if (!error_) error_ = error;
      next_ = count_;
    }
  }
  --running_;
}

void ThreadPool::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    begun_.wait(lock, [this] { return stopping_ || next_ < count_; });
    if (stopping_) return;
    take_part(lock);
    if (running_ == 0) ended_.notify_all();
  }
}

void ThreadPool::run(std::size_t count, const std::function<void(std::size_t)>& work) {
  if (fork_generation_ != fork_generation()) {
    throw std::runtime_error("a forked child has none of its parent's threads; make new ones");
  }
  if (count == 0) return;
  if (count == 1) {
    work(0);
    return;
  }
  std::lock_guard caller(caller_mutex_);
  std::unique_lock lock(mutex_);
  work_ = &work;
  next_ = 0;
  count_ = count;
  begun_.notify_all();
  ended_.wait(lock, [this] { return next_ >= count_ && running_ == 0; });
  work_ = nullptr;
  count_ = next_ = 0;
  if (auto error = std::exchange(error_, nullptr)) std::rethrow_exception(error);
}

}  // namespace offload
