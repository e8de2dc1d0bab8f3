// Transfers of any length over an engine. The queue splits a transfer into blocks, keeps the
// engine full, resumes what came back short, checks every block that is read against its CRC32C,
// and completes each transfer exactly once. One thread owns the engine; any thread may submit.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "busy_time.h"
#include "error.h"
#include "fork_guard.h"
#include "io_engine.h"

namespace offload {

class IoQueue;

// What to move. `owner` keeps memory and file space alive until the last block has come back.
struct TransferRequest {
  IoOp op;
  std::byte* address;
  std::uint64_t nbytes;
  std::uint64_t offset;
  // One CRC32C a block, for a read to be compared with; nullptr: not checked.
  const std::uint32_t* checksums = nullptr;
  std::shared_ptr<void> owner;
  // Called once on the queue's thread when the transfer is done, failed or cancelled.
  std::function<void(const std::optional<IoError>&, bool cancelled)> on_end;
};

class Transfer {
 public:
  enum class State : std::uint8_t { kQueued, kRunning, kDone, kFailed, kCancelled };

  State state() const { return state_.load(std::memory_order_acquire); }
  bool ended() const { return state() >= State::kDone; }

 private:
  friend class IoQueue;
  explicit Transfer(TransferRequest request) : request_(std::move(request)) {}

  TransferRequest request_;
  std::atomic<State> state_{State::kQueued};
  bool withdrawn_ = false;        // cancelled while queued; the queue's mutex guards it
  std::uint64_t next_block_ = 0;  // the queue thread's, like all below
  std::uint64_t blocks_out_ = 0;
  std::optional<IoError> error_;  // written before state_ says kFailed
};

struct QueueStats {
  std::uint64_t read_bytes = 0;
  std::uint64_t write_bytes = 0;
  std::uint64_t resumed = 0;   // short transfers continued
  std::uint64_t requests = 0;  // handed to the engine
  double verify_s = 0;         // CPU seconds comparing checksums
  double thread_cpu_s = 0;     // CPU seconds of the queue's thread, verifying included
  BusyStats busy;
};

class IoQueue {
 public:
  struct Options {
    int fd;
    std::string path;  // for messages
    std::uint64_t block_bytes;
    std::uint32_t alignment;  // a resumed request starts at a multiple of this
    unsigned depth;
    // Called now and then by a thread that waits, without locks; what it throws ends the waiting.
    std::function<void()> poll = nullptr;
  };

  IoQueue(std::unique_ptr<IoEngine> engine, Options options);
  ~IoQueue();  // close()
  IoQueue(const IoQueue&) = delete;
  IoQueue& operator=(const IoQueue&) = delete;

  // A `lazy` transfer need not start at once: it waits until a block's worth has come together, or
  // until anybody waits, drains or calls flush(). It saves waking the thread for each of many
  // small ones.
  std::shared_ptr<Transfer> submit(TransferRequest request, bool lazy = false);
  // Starts whatever is queued.
  void flush();
  // True if no block had been handed to the engine: then nothing was or will be moved.
  bool try_cancel(Transfer& transfer);
  // Returns when the transfer has ended; throws its IoError if it failed or was cancelled.
  void wait(const Transfer& transfer);
  // Until nothing is queued or in flight.
  void drain();
  // Cancels what has not begun, waits for the rest, joins the thread. Idempotent.
  void close();

  // A forked child has neither the thread nor the memory: there, everything above throws this too.
  void check_process() const;
  QueueStats stats() const;

 private:
  // One block on its way: which part of it is still to be moved.
  struct Flight {
    std::shared_ptr<Transfer> transfer;
    std::uint64_t block = 0;
    std::uint64_t done = 0;  // bytes of the block that have arrived
    unsigned stuck = 0;      // completions in a row that moved nothing
  };

  void wait_until(const std::function<bool()>& condition);  // asked under the lock
  void wake_thread();
  void run();
  void run_guarded();
  bool refill();
  std::optional<std::size_t> next_flight();
  bool stage(std::size_t slot);
  void handle(const Completion& completion);
  bool resume(std::size_t slot, std::int64_t result);
  void verify(const Flight& flight);
  void fail(Transfer& transfer, IoError error);
  void release(std::size_t slot);
  void end_if_idle(const std::shared_ptr<Transfer>& transfer);
  void end(Transfer& transfer, Transfer::State state);
  void fail_everything(const IoError& error);
  std::vector<std::shared_ptr<Transfer>> withdraw_all();
  std::uint64_t block_bytes_of(const Transfer& transfer, std::uint64_t block) const;

  std::unique_ptr<IoEngine> engine_;
  Options options_;
  int fork_generation_;

  mutable std::mutex mutex_;
  ParentOwned<std::condition_variable> work_;    // the queue's thread, when nothing is in flight
  ParentOwned<std::condition_variable> ended_;   // everyone else
  std::deque<std::shared_ptr<Transfer>> reads_;  // ahead of writes: a backward waits for them
  std::deque<std::shared_ptr<Transfer>> writes_;
  bool asleep_in_engine_ = false;
  std::uint64_t lazy_bytes_ = 0;  // queued since the thread was last told
  bool stopping_ = false;
  bool closed_ = false;
  std::uint64_t live_transfers_ = 0;
  QueueStats stats_;
  std::optional<IoError> broken_;

  // The queue thread's own.
  std::vector<Flight> flights_;  // in the engine, and as many that are here and being compared
  std::vector<std::size_t> free_slots_;
  std::deque<std::size_t> again_;  // slots to be staged once more
  std::vector<std::size_t> to_verify_;
  std::shared_ptr<Transfer> current_;  // blocks of it are still to be handed out
  std::size_t in_engine_ = 0;
  InFlight in_flight_;
  bool backpressure_ = false;  // the engine refused a block that it had room for
  QueueStats counted_;         // what stats_ will say next

  std::thread thread_;
};

}  // namespace offload
