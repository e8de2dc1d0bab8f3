#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "error.h"

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
    : fork_generation_(fork_generation()), num_threads_(num_threads), bound_(!cpus.empty()) {
  if (num_threads == 0) throw std::invalid_argument("num_threads must be at least 1, not 0");
  State& state = *state_.operator->();
  state.threads.reserve(num_threads);
  try {
    for (unsigned index = 0; index < num_threads; ++index) {
      state.threads.push_back(start_thread([&state] { serve(state); }, ""));
      if (!cpus.empty()) bind_to(state.threads.back(), cpus);
    }
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  // A forked child leaves all of it alone: the threads, and who waits, are in the parent only.
  if (fork_generation_ == fork_generation()) stop();
}

void ThreadPool::stop() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->begun.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

// Takes indices until none is left.
void ThreadPool::take_part(State& state, std::unique_lock<std::mutex>& lock) {
  ++state.running;
  while (state.next < state.count) {
    const std::size_t index = state.next++;
    const auto* work = state.work;
    lock.unlock();
    std::exception_ptr error;
    try {
      (*work)(index);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error) {
      if (!state.error) state.error = error;
      state.next = state.count;
    }
  }
  --state.running;
}

void ThreadPool::serve(State& state) {
  std::unique_lock lock(state.mutex);
  for (;;) {
    state.begun.wait(lock, [&state] { return state.stopping || state.next < state.count; });
    if (state.stopping) return;
    take_part(state, lock);
    if (state.running == 0) state.ended.notify_all();
  }
}

void ThreadPool::run(std::size_t count, const std::function<void(std::size_t)>& work) {
  if (fork_generation_ != fork_generation()) {
    throw std::runtime_error("a forked child has none of its parent's threads; make new ones");
  }
  if (count == 0) return;
  if (count == 1 && !bound_) {  // the caller may be on another processor than is allowed
    work(0);
    return;
  }
  State& state = *state_.operator->();
  std::lock_guard caller(state.caller_mutex);
  std::unique_lock lock(state.mutex);
  state.work = &work;
  state.next = 0;
  state.count = count;
  state.begun.notify_all();
  state.ended.wait(lock, [&state] { return state.next >= state.count && state.running == 0; });
  state.work = nullptr;
  state.count = state.next = 0;
  if (auto error = std::exchange(state.error, nullptr)) std::rethrow_exception(error);
}

}  // namespace offload
