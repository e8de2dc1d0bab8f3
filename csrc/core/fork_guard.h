// What a forked child must not touch: our descriptors keep spill space alive after the parent is
// killed, and our locks may be held by threads that do not exist in the child.
#pragma once

#include <functional>
#include <memory>

namespace offload {

// Grows by one in every forked child. An object remembers the value it was made under and does
// nothing in a process where the value differs.
int fork_generation();

// Calls `open` and returns its descriptor (negative: errno says why), which forked children close
// at once. Nobody forks in between, so no child keeps what it does not know of.
int open_here(const std::function<int()>& open);
// The same for a descriptor that somebody else opened, and has not closed yet: from now on forked
// children close it, or no longer.
void close_in_children(int fd);
void keep_in_children(int fd);
// Closes the descriptor; a child forked at the same moment has it closed as well.
void close_here(int fd);

// What a forked child must not even destroy: a condition variable's destructor waits until its
// waiters have left, and theirs are threads that the child does not have.
template <typename T>
class ParentOwned {
 public:
  ParentOwned() : value_(std::make_unique<T>()), generation_(fork_generation()) {}
  ~ParentOwned() {
    if (generation_ == fork_generation()) return;
    [[maybe_unused]] T* left = value_.release();
  }
  ParentOwned(const ParentOwned&) = delete;
  ParentOwned& operator=(const ParentOwned&) = delete;

  T* operator->() const { return value_.get(); }

 private:
  std::unique_ptr<T> value_;
  int generation_;
};

}  // namespace offload
