// Tensors' bytes on the SSD: one nameless file, extents in it, and the way of each extent out
// through staging memory and back. Checksums are made while staging and stay in memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "arena.h"
#include "extent_allocator.h"
#include "file.h"
#include "io_queue.h"

namespace offload {

struct SpillOptions {
  std::string directory;
  std::string engine = "auto";  // "auto", "uring", "posix"
  unsigned queue_depth = 32;
  std::uint64_t block_bytes = std::uint64_t{1} << 20;
  std::uint64_t spill_bytes = 0;  // 0: half of the free space, less what others took of it since
  bool verify = true;
  bool direct = true;
  bool register_buffers = true;
  std::optional<FaultPlan> faults;
  std::function<void()> poll;  // see IoQueue::Options
};

struct SpillStats {
  QueueStats queue;
  std::uint64_t used_bytes = 0;
  std::uint64_t peak_used_bytes = 0;
  std::uint64_t reserved_bytes = 0;  // of the file system
  std::uint64_t limit_bytes = 0;
  std::uint64_t reloaded_bytes = 0;    // handed back after a read
  std::uint64_t forwarded_bytes = 0;   // handed back without one
  std::uint64_t cancelled_bytes = 0;   // of those, never written either
  std::uint64_t kept_bytes = 0;        // live in memory because a write found no space
  std::uint64_t kept_total_bytes = 0;  // the same, of all time
  double copy_s = 0;                   // CPU seconds copying and checksumming
  double write_wait_s = 0;             // waiting for staging memory
  double read_wait_s = 0;              // waiting for bytes to come back
};

class Spill;

// Where a tensor's bytes are again: `address` has the residue modulo 64 that they were saved at.
struct Restored {
  std::shared_ptr<Slice> slice;
  std::byte* address = nullptr;
  std::uint64_t nbytes = 0;
  bool forwarded = false;  // from the staging copy: nothing was read
};

// One spilled run of bytes. Dropping it frees its space, once nothing is in flight for it.
class Extent {
 public:
  ~Extent();
  Extent(const Extent&) = delete;
  Extent& operator=(const Extent&) = delete;

  // Queues reading back, to begin with the next Spill::flush() or once a block's worth has come
  // together; false when there is no room in the arena or the write is still going on piece by
  // piece. Needless calls are harmless.
  bool prefetch();
  // Waits until the bytes are here; while an earlier answer is still in use, returns it again.
  // Throws IoError, also that of a failed write of another extent: the drive has begun to lose
  // tensors. After a failed read the extent stays readable.
  Restored fetch();
  // Whether fetch() is certain not to wait. While a write is going on nothing is: its staging copy
  // may go at any moment.
  bool ready() const;
  void wait_written();
  // Of Spill::stage(): where somebody is to put the bytes. They must stay untouched from
  // start_write() on.
  Restored staged();
  // Says that they are all there: makes their checksums and begins to write, unless they have been
  // fetched meanwhile. Any thread, once.
  void start_write();
  std::uint64_t nbytes() const { return nbytes_; }
  std::uint64_t offset() const;

 private:
  friend class Spill;

  // A run of blocks staged and written together.
  struct Piece {
    std::uint64_t begin = 0;
    std::uint64_t nbytes = 0;
    std::shared_ptr<Slice> slice;  // while the bytes are (also) in memory
    std::shared_ptr<Transfer> write;
    bool no_space = false;  // the drive was full: `slice` is the only copy
  };
  struct Shared;  // what transfers in flight must keep alive; never the Spill, which joins them

  Extent() = default;
  void fill_in(const std::shared_ptr<Arena>& arena, std::shared_ptr<Slice> slice);
  bool whole_in_memory() const;  // under Shared::mutex
  bool written() const;          // under Shared::mutex
  std::shared_ptr<Transfer> start_read(std::shared_ptr<Slice> slice, std::uint64_t begin,
                                       std::uint64_t nbytes);
  void copy_unwritten(std::byte* to) const;  // under Shared::mutex
  std::optional<Restored> forward();
  Restored obtain();
  Restored hand_out(std::shared_ptr<Slice> slice, bool forwarded);

  std::shared_ptr<Spill> spill_;
  std::shared_ptr<Shared> shared_;
  std::uint64_t lead_ = 0;  // bytes before the tensor's first, keeping its address modulo 64
  std::uint64_t nbytes_ = 0;
  std::uint64_t extent_bytes_ = 0;
  std::optional<Restored> held_;     // forwarded by prefetch(), waiting for fetch()
  std::weak_ptr<Slice> handed_out_;  // by the last fetch()
  std::shared_ptr<Slice> read_slice_;
  std::shared_ptr<Transfer> read_;
  // Both under Shared::mutex: what start_write() will write, and that it need not any more.
  std::shared_ptr<void> filling_;
  bool unwanted_ = false;
};

class Spill : public std::enable_shared_from_this<Spill> {
 public:
  static std::shared_ptr<Spill> open(SpillOptions options, std::shared_ptr<Arena> arena);
  ~Spill();

  // Copies [source, source + nbytes) into staging and starts writing; `source` is free again on
  // return. Waits while staging is full. nullptr when the spill has no space for it. Throws the
  // IoError of an earlier write that failed.
  std::shared_ptr<Extent> write(const std::byte* source, std::uint64_t nbytes);
  // Space and staging, in one run, for bytes that a device will put there, the first one at an
  // address equal to `lead` modulo 64: see Extent::staged(). Otherwise as write(), but nullptr also
  // where staging has no room and nothing is on its way out of it.
  std::shared_ptr<Extent> stage(std::uint64_t nbytes, std::uint64_t lead);
  // Space for bytes that were fetched and have been changed where they are; they stay there and are
  // staged already: see Extent::staged(). nullptr where there is no space.
  std::shared_ptr<Extent> restage(const Restored& bytes);
  // Space alone, page-aligned, for somebody who writes to file().fd() himself; fetch() reads it.
  // nullptr when there is none. Nothing of it is verified.
  std::shared_ptr<Extent> reserve(std::uint64_t nbytes);
  // Returns when the arena is within its limit, or nothing is on its way out of it.
  void wait_within_limit();
  // Starts writes that still wait for company.
  void flush();
  void drain();
  void close();

  SpillStats stats() const;
  // The first failed write other than a full drive, if any: its tensor is lost.
  std::optional<IoError> write_error() const;
  void raise_write_error() const;
  // Of somebody who has kept what could not be written: nothing is lost.
  void forget_write_error();
  const SpillFile& file() const { return *file_; }
  const std::string& engine_name() const { return engine_name_; }
  const std::string& engine_reason() const { return engine_reason_; }
  bool registered() const { return register_code_ == 0; }
  int register_code() const { return register_code_; }

 private:
  friend class Extent;
  struct FileRange;
  struct StagedWrite;
  struct Space;  // of the file, with the counters: outlives the Spill while transfers use it

  explicit Spill(SpillOptions options, std::shared_ptr<Arena> arena);
  void check_process() const;
  std::unique_ptr<IoEngine> choose_engine();
  std::shared_ptr<FileRange> allocate(std::uint64_t nbytes);
  bool grow(std::uint64_t nbytes);  // under Space::mutex
  std::shared_ptr<Slice> wait_for_room(std::uint64_t nbytes);
  void wait_for_writes(std::uint64_t seen);
  std::shared_ptr<Slice> stage_memory(std::uint64_t nbytes);
  std::shared_ptr<Extent> make_extent(std::uint64_t nbytes, std::uint64_t lead);
  void fill_piece(Extent& extent, std::size_t index, const std::byte* source);
  void submit_piece(Extent& extent, std::size_t index, std::shared_ptr<StagedWrite> staged);
  static std::shared_ptr<Slice> move_outside(Arena& arena, std::shared_ptr<Slice> staged);
  static void end_write(Space& space, Extent::Shared& shared, std::size_t piece, Arena& arena,
                        const std::optional<IoError>& error);

  SpillOptions options_;
  std::shared_ptr<Arena> arena_;
  std::unique_ptr<SpillFile> file_;
  std::string engine_name_;
  std::string engine_reason_;
  int register_code_ = 0;
  int fork_generation_;
  std::uint64_t limit_ = 0;

  std::mutex close_mutex_;
  std::atomic<bool> closed_{false};  // set under close_mutex_

  std::shared_ptr<Space> space_;

  std::unique_ptr<IoQueue> queue_;  // last: its thread uses all of the above
};

}  // namespace offload
