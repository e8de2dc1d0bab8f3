// What a forked child finds: no descriptor of ours, a new generation, objects that it can drop
// without waiting for threads it does not have, and a refusal instead of a crash.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <thread>
#include <vector>

#include "check.h"
#include "fork_guard.h"
#include "spill.h"

using namespace offload;

namespace {

constexpr int kRefused = 77;

// The status of a child that runs `body`; one that hangs is ended by its alarm.
int status_of_child(const auto& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(30);
    int status = 0;
    try {
      status = body();
    } catch (const std::runtime_error&) {
      status = kRefused;
    } catch (...) {
      status = 99;
    }
    ::_exit(status);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

bool is_open(int fd) { return ::fcntl(fd, F_GETFD) >= 0; }

void a_child_closes_what_was_announced_and_only_that() {
  int announced[2];
  int other[2];
  CHECK(::pipe(announced) == 0 && ::pipe(other) == 0);
  for (const int fd : announced) CHECK_EQ(open_here([fd] { return fd; }), fd);
  CHECK_EQ(status_of_child([&] {
             return (is_open(announced[0]) ? 1 : 0) + (is_open(announced[1]) ? 2 : 0) +
                    (is_open(other[0]) ? 0 : 4);
           }),
           0);
  CHECK(is_open(announced[0]));
  close_here(announced[0]);
  CHECK(!is_open(announced[0]));
  // The number may be another file's by now, which a child must keep.
  const int reused = ::dup2(other[0], announced[0]);
  CHECK_EQ(status_of_child([&] { return is_open(reused) ? 0 : 1; }), 0);
  close_here(announced[1]);
  for (const int fd : {reused, other[0], other[1]}) ::close(fd);
}

void a_descriptor_that_does_not_open_is_not_announced() {
  errno = 0;
  CHECK_EQ(open_here([] { return ::open("/no/such/file", O_RDONLY | O_CLOEXEC); }), -1);
  CHECK_EQ(errno, ENOENT);
  CHECK_EQ(status_of_child([] { return 0; }), 0);
}

void every_generation_of_children_differs() {
  const int here = fork_generation();
  CHECK_EQ(status_of_child([&] {
             const int child = fork_generation();
             const int grandchild = status_of_child([] { return fork_generation(); });
             return child == here + 1 && grandchild == here + 2 ? 0 : 1;
           }),
           0);
  CHECK_EQ(fork_generation(), here);
}

void a_child_drops_a_condition_that_the_parent_waits_on() {
  auto condition = std::make_unique<ParentOwned<std::condition_variable>>();
  std::mutex mutex;
  bool waiting = false;
  bool leave = false;
  std::thread waiter([&] {
    std::unique_lock lock(mutex);
    waiting = true;
    (*condition)->wait(lock, [&] { return leave; });
  });
  for (bool there = false; !there; std::this_thread::yield()) {
    std::lock_guard lock(mutex);
    there = waiting;
  }
  CHECK_EQ(status_of_child([&] {
             condition.reset();
             return 0;
           }),
           0);
  {
    std::lock_guard lock(mutex);
    leave = true;
  }
  (*condition)->notify_all();
  waiter.join();
}

struct Spilled {
  check::Directory directory;
  std::shared_ptr<Arena> arena = Arena::create(8 << 20);
  std::shared_ptr<Spill> spill;
  std::vector<std::byte> bytes = std::vector<std::byte>(1 << 20, std::byte{7});

  explicit Spilled(const std::string& engine) {
    SpillOptions options;
    options.directory = directory.path;
    options.engine = engine;
    options.spill_bytes = 64 << 20;
    spill = Spill::open(options, arena);
  }
};

void a_child_is_refused_and_leaves_without_waiting(const std::string& engine) {
  Spilled here(engine);
  auto written = here.spill->write(here.bytes.data(), here.bytes.size());
  written->wait_written();
  auto prefetched = here.spill->write(here.bytes.data(), here.bytes.size());
  prefetched->prefetch();  // most likely forwarded: the child has no such memory
  auto buffer = written->fetch();
  here.spill->drain();
  CHECK_EQ(status_of_child([&] { return here.spill->write(here.bytes.data(), 1) ? 1 : 2; }),
           kRefused);
  CHECK_EQ(status_of_child([&] { return int(written->fetch().nbytes); }), kRefused);
  CHECK_EQ(status_of_child([&] { return int(prefetched->fetch().nbytes); }), kRefused);
  CHECK_EQ(status_of_child([&] { return int(written->prefetch()); }), kRefused);
  CHECK_EQ(status_of_child([&] { return here.spill->drain(), 1; }), kRefused);
  const auto drop_all = [&] {
    written.reset();
    prefetched.reset();
    buffer.slice.reset();
    here.spill.reset();
    here.arena.reset();
    return 0;
  };
  CHECK_EQ(status_of_child(drop_all), 0);
  // The parent's are as they were.
  CHECK(std::equal(here.bytes.begin(), here.bytes.end(), buffer.address));
  CHECK(std::equal(here.bytes.begin(), here.bytes.end(), written->fetch().address));
}

void a_child_of_a_busy_parent_leaves_without_waiting(const std::string& engine) {
  Spilled here(engine);
  std::vector<std::shared_ptr<Extent>> extents;
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 4; ++i) {
      extents.push_back(here.spill->write(here.bytes.data(), here.bytes.size()));
    }
    CHECK_EQ(status_of_child([&] {
               extents.clear();
               here.spill.reset();
               here.arena.reset();
               return 0;
             }),
             0);
  }
  for (const auto& extent : extents) {
    CHECK(std::equal(here.bytes.begin(), here.bytes.end(), extent->fetch().address));
  }
}

}  // namespace

int main() {
  a_child_closes_what_was_announced_and_only_that();
  a_descriptor_that_does_not_open_is_not_announced();
  every_generation_of_children_differs();
  a_child_drops_a_condition_that_the_parent_waits_on();
  for (const char* engine : {"auto", "posix"}) {
    a_child_is_refused_and_leaves_without_waiting(engine);
    a_child_of_a_busy_parent_leaves_without_waiting(engine);
  }
  return check::status();
}
