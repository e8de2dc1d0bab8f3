#include "fork_guard.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

namespace offload {
namespace {

// pthread_atfork handlers take no argument, so this registry is the process's.
struct Registry {
  std::mutex mutex;
  std::vector<int> descriptors;
  std::atomic<int> generation{0};
};

Registry& registry() {
  static Registry* instance = [] {
    auto* made = new Registry;  // never destroyed: children may fork during static destruction
    pthread_atfork([] { registry().mutex.lock(); }, [] { registry().mutex.unlock(); },
                   [] {
                     Registry& self = registry();
                     self.generation.fetch_add(1, std::memory_order_relaxed);
                     for (int fd : self.descriptors) ::close(fd);
                     self.descriptors.clear();
                     self.mutex.unlock();
                   });
    return made;
  }();
  return *instance;
}

}  // namespace

int fork_generation() { return registry().generation.load(std::memory_order_relaxed); }

int open_here(const std::function<int()>& open) {
  Registry& self = registry();
  std::lock_guard lock(self.mutex);
  self.descriptors.reserve(self.descriptors.size() + 1);  // what throws must come before open()
  const int fd = open();
  if (fd >= 0) self.descriptors.push_back(fd);
  return fd;
}

void close_in_children(int fd) {
  Registry& self = registry();
  std::lock_guard lock(self.mutex);
  self.descriptors.push_back(fd);
}

void keep_in_children(int fd) {
  Registry& self = registry();
  std::lock_guard lock(self.mutex);
  std::erase(self.descriptors, fd);
}

void close_here(int fd) {
  Registry& self = registry();
  // A fork waits for this lock, so no child sees the descriptor open and forgotten.
  std::lock_guard lock(self.mutex);
  std::erase(self.descriptors, fd);
  ::close(fd);
}

}  // namespace offload
