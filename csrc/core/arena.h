// Page-aligned host memory with a hard cap: staging for what is being written, and the buffers
// that restored tensors live in. One mapping, so that one registration serves all I/O.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "extent_allocator.h"
#include "fork_guard.h"

namespace offload {

// An anonymous mapping of whole pages, absent in forked children (the drive may be writing to it).
class HostMapping {
 public:
  explicit HostMapping(std::size_t nbytes);  // std::bad_alloc where the kernel has none
  ~HostMapping();
  HostMapping(const HostMapping&) = delete;
  HostMapping& operator=(const HostMapping&) = delete;

  std::byte* data() const { return data_; }
  std::size_t nbytes() const { return nbytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t nbytes_;
  int fork_generation_;
};

class Arena;

// A page-aligned run of bytes; goes back to where it came from when the last owner drops it.
class Slice {
 public:
  ~Slice();
  Slice(const Slice&) = delete;
  Slice& operator=(const Slice&) = delete;

  std::byte* data() const { return data_; }
  std::size_t nbytes() const { return nbytes_; }
  bool outside() const { return mapping_ != nullptr; }

 private:
  friend class Arena;
  Slice() = default;

  std::shared_ptr<Arena> arena_;
  std::unique_ptr<HostMapping> mapping_;  // set when the slice lies outside the arena
  std::byte* data_ = nullptr;
  std::size_t nbytes_ = 0;
};

struct ArenaStats {
  std::uint64_t capacity = 0;
  std::uint64_t used = 0;
  std::uint64_t peak_used = 0;
  std::uint64_t outside = 0;      // live bytes that the cap could not serve
  std::uint64_t native = 0;       // resident now: touched (all of it once registered) + outside
  std::uint64_t native_peak = 0;  // the largest that sum ever was
};

class Arena : public std::enable_shared_from_this<Arena> {
 public:
  static std::shared_ptr<Arena> create(std::size_t capacity);

  // A slice of whole pages, or nullptr when the arena has no such run free, or would have more than
  // its limit in use. Any thread.
  std::shared_ptr<Slice> try_allocate(std::size_t nbytes);
  // Holds what is in use to `nbytes`, or one slice if that is larger. Less than the capacity, and
  // may change at any time: what is in use already stays.
  void set_limit(std::uint64_t nbytes) { limit_.store(nbytes); }
  bool within_limit() const;
  // A mapping of its own, for a tensor that must exist now though the arena is full. Any thread.
  std::shared_ptr<Slice> allocate_outside(std::size_t nbytes);
  // Whoever stages through this arena says so; the last one to leave may trim it.
  void add_user() { users_.fetch_add(1); }
  std::uint64_t remove_user() { return users_.fetch_sub(1) - 1; }
  bool shared() const { return users_.load() > 1; }
  // Counts writes under way from staging, whichever file they go to: while there are any, waiting
  // for memory makes sense. A write ends after its slice has come back.
  void begin_write() { writes_.fetch_add(1); }
  void end_write() { writes_.fetch_sub(1); }
  bool writing() const { return writes_.load() != 0; }
  // Returns when some slice has come back since `seen` (a releases() value), or at the deadline.
  void wait_release(std::uint64_t seen, std::chrono::milliseconds limit);
  std::uint64_t releases() const;

  // The whole mapping, for registration; mark_resident() says that registration touched all of it.
  std::byte* data() const { return mapping_.data(); }
  std::size_t capacity() const { return mapping_.nbytes(); }
  void mark_resident();
  // The NUMA node that the first page lies on, touching it; -1 where the kernel does not tell.
  int numa_node();
  // Gives the memory back to the system if no slice is in use. Registered memory must not be
  // trimmed: the kernel would go on using the old pages.
  void trim();
  ArenaStats stats() const;

 private:
  friend class Slice;
  explicit Arena(std::size_t capacity);
  void give_back(Slice& slice);
  void note_peak();  // under mutex_
  std::uint64_t native_now() const;

  HostMapping mapping_;
  int fork_generation_;
  mutable std::mutex mutex_;
  ParentOwned<std::condition_variable> released_;
  ExtentAllocator allocator_;
  std::uint64_t outside_ = 0;
  std::uint64_t native_peak_ = 0;
  std::uint64_t releases_ = 0;
  bool resident_ = false;
  std::atomic<std::uint64_t> limit_{UINT64_MAX};
  std::atomic<std::uint64_t> writes_{0};
  std::atomic<std::uint64_t> users_{0};
};

}  // namespace offload
