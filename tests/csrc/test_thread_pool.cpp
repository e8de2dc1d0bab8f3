// Work on a pool's threads: each piece once, errors come back, forked children are told.
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "error.h"
#include "thread_pool.h"

using namespace offload;

namespace {

void every_piece_is_done_once() {
  for (const unsigned num_threads : {1u, 2u, 7u}) {
    ThreadPool pool(num_threads);
    CHECK_EQ(pool.num_threads(), num_threads);
    for (const std::size_t count : {0, 1, 2, 5, 1000}) {
      std::vector<std::atomic<int>> times(count);
      pool.run(count, [&](std::size_t index) { ++times[index]; });
      for (const auto& each : times) CHECK_EQ(each.load(), 1);
    }
  }
}

void callers_take_turns() {
  ThreadPool pool(2);
  std::atomic<int> done{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) pool.run(8, [&](std::size_t) { ++done; });
    });
  }
  for (auto& caller : callers) caller.join();
  CHECK_EQ(done.load(), 4 * 50 * 8);
}

void the_first_error_comes_back_and_the_pool_goes_on() {
  ThreadPool pool(2);
  std::atomic<int> done{0};
  CHECK_THROWS(pool.run(10000,
                        [&](std::size_t index) {
                          if (index == 3) throw std::domain_error("three");
                          ++done;
                        }),
               std::domain_error);
  CHECK(done.load() < 10000);
  done = 0;
  pool.run(100, [&](std::size_t) { ++done; });
  CHECK_EQ(done.load(), 100);
}

void threads_stay_on_their_cpus() {
  cpu_set_t mine;
  CHECK_EQ(::sched_getaffinity(0, sizeof mine, &mine), 0);
  int first = 0;
  while (!CPU_ISSET(first, &mine)) ++first;
  ThreadPool pool(2, {first});
  std::atomic<int> elsewhere{0};
  pool.run(64, [&](std::size_t) { elsewhere += ::sched_getcpu() != first; });
  CHECK_EQ(elsewhere.load(), 0);
  // Nor is a single piece of work done by the caller, who may be anywhere.
  std::thread::id worker;
  pool.run(1, [&](std::size_t) { worker = std::this_thread::get_id(); });
  CHECK(worker != std::this_thread::get_id());
}

void what_cannot_be_had_is_refused() {
  CHECK_THROWS(ThreadPool(0), std::invalid_argument);
  CHECK_THROWS(ThreadPool(1, {-1}), std::invalid_argument);
  CHECK_THROWS(ThreadPool(1, {1 << 20}), std::invalid_argument);
  CHECK_THROWS(ThreadPool(2, {1023}), IoError);
}

void a_forked_child_is_told_and_ends() {
  auto pool = std::make_unique<ThreadPool>(2);
  pool->run(4, [](std::size_t) {});
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);  // rather than hang
    bool told = false;
    try {
      pool->run(4, [](std::size_t) {});
    } catch (const std::runtime_error&) {
      told = true;
    }
    pool.reset();
    ::_exit(told ? 0 : 1);
  }
  int status = -1;
  CHECK_EQ(::waitpid(child, &status, 0), child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace

int main() {
  every_piece_is_done_once();
  callers_take_turns();
  the_first_error_comes_back_and_the_pool_goes_on();
  threads_stay_on_their_cpus();
  what_cannot_be_had_is_refused();
  a_forked_child_is_told_and_ends();
  return check::status();
}
