#include "io_queue.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <set>
#include <utility>

#include "align.h"
#include "clock.h"
#include "crc32c.h"
#include "retry.h"

namespace offload {
namespace {

constexpr std::chrono::milliseconds kPollInterval{100};

IoError mismatch(const TransferRequest& request, const std::string& path, std::uint64_t block,
                 std::uint64_t block_bytes, std::uint64_t length, std::uint32_t stored,
                 std::uint32_t read) {
  char sums[64];
  std::snprintf(sums, sizeof sums, "crc32c %08x was written, %08x read back", stored, read);
  return IoError(EBADMSG,
                 "read of " + std::to_string(length) + " bytes at offset " +
                     std::to_string(request.offset + block * block_bytes) +
                     " returned other bytes than were written (extent at " +
                     std::to_string(request.offset) + ", " + std::to_string(request.nbytes) +
                     " bytes; " + sums + "); the drive or its memory is failing",
                 path);
}

}  // namespace

IoQueue::IoQueue(std::unique_ptr<IoEngine> engine, Options options)
    : engine_(std::move(engine)),
      options_(std::move(options)),
      fork_generation_(fork_generation()),
      flights_(2 * options_.depth) {
  for (std::size_t slot = flights_.size(); slot != 0; --slot) free_slots_.push_back(slot - 1);
  thread_ = start_thread([this] { run_guarded(); }, options_.path);
}

IoQueue::~IoQueue() {
  if (fork_generation_ != fork_generation()) {
    // The thread exists only in the parent, and so do the kernel's ends of the engine.
    if (thread_.joinable()) thread_.detach();  // a queue that was closed before has none
    [[maybe_unused]] IoEngine* left = engine_.release();
    return;
  }
  close();
}

void IoQueue::check_process() const {
  if (fork_generation_ != fork_generation()) {
    throw std::runtime_error(
        "offloaded tensors belong to the process that offloaded them and cannot be used in a "
        "forked child");
  }
}

std::shared_ptr<Transfer> IoQueue::submit(TransferRequest request, bool lazy) {
  check_process();
  std::shared_ptr<Transfer> transfer(new Transfer(std::move(request)));
  const TransferRequest& asked = transfer->request_;
  std::lock_guard lock(mutex_);
  if (broken_) throw *broken_;
  if (stopping_) throw std::runtime_error("the I/O queue is closed");
  (asked.op == IoOp::kWrite ? writes_ : reads_).push_back(transfer);
  ++live_transfers_;
  lazy_bytes_ += asked.nbytes;
  if (!lazy || lazy_bytes_ >= options_.block_bytes) wake_thread();
  return transfer;
}

// Under the lock: a close() on another thread destroys the engine.
void IoQueue::wake_thread() {
  lazy_bytes_ = 0;
  if (std::exchange(asleep_in_engine_, false)) {
    engine_->wake();
  } else {
    work_->notify_one();
  }
}

void IoQueue::flush() {
  check_process();
  std::lock_guard lock(mutex_);
  if (lazy_bytes_ != 0 && !stopping_) wake_thread();
}

bool IoQueue::try_cancel(Transfer& transfer) {
  check_process();
  {
    std::lock_guard lock(mutex_);
    if (transfer.withdrawn_ || transfer.state() != Transfer::State::kQueued) return false;
    transfer.withdrawn_ = true;  // its place in the queue goes when the thread comes by
  }
  end(transfer, Transfer::State::kCancelled);
  return true;
}

void IoQueue::wait_until(const std::function<bool()>& condition) {
  for (;;) {
    flush();  // again and again: others may submit meanwhile
    {
      std::unique_lock lock(mutex_);
      if (ended_->wait_for(lock, kPollInterval, condition)) return;
    }
    if (options_.poll) options_.poll();
  }
}

void IoQueue::wait(const Transfer& transfer) {
  wait_until([&] { return transfer.ended(); });
  if (transfer.state() == Transfer::State::kFailed) throw *transfer.error_;
  if (transfer.state() == Transfer::State::kCancelled) {
    throw io_error(ECANCELED, name_of(transfer.request_.op), options_.path,
                   transfer.request_.offset, transfer.request_.nbytes);
  }
}

void IoQueue::drain() {
  wait_until([this] { return live_transfers_ == 0; });
}

void IoQueue::close() {
  check_process();
  std::vector<std::shared_ptr<Transfer>> dropped;
  {
    std::lock_guard lock(mutex_);
    if (std::exchange(closed_, true)) return;
    stopping_ = true;
    dropped = withdraw_all();
  }
  for (auto& transfer : dropped) end(*transfer, Transfer::State::kCancelled);
  engine_->wake();
  work_->notify_one();
  thread_.join();
  engine_.reset();
}

// Under the lock. Each transfer returned is the caller's alone to end.
std::vector<std::shared_ptr<Transfer>> IoQueue::withdraw_all() {
  std::vector<std::shared_ptr<Transfer>> ours;
  for (auto* queue : {&reads_, &writes_}) {
    for (auto& transfer : *queue) {
      if (!std::exchange(transfer->withdrawn_, true)) ours.push_back(std::move(transfer));
    }
    queue->clear();
  }
  return ours;
}

QueueStats IoQueue::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

void IoQueue::run_guarded() {
  try {
    run();
  } catch (const IoError& error) {
    fail_everything(error);
  } catch (const std::exception& error) {
    fail_everything(IoError(EIO, error.what(), options_.path));
  }
}

void IoQueue::run() {
  std::vector<Completion> completions;
  for (;;) {
    backpressure_ = false;
    while (refill()) {
    }
    engine_->submit();
    // Blocks already here are compared while the drive works on the ones just submitted.
    for (const std::size_t slot : std::exchange(to_verify_, {})) {
      verify(flights_[slot]);
      release(slot);
    }
    {
      std::unique_lock lock(mutex_);
      counted_.thread_cpu_s = thread_cpu_s();
      counted_.busy = in_flight_.stats();
      stats_ = counted_;
      const bool more = !reads_.empty() || !writes_.empty() || current_ || !again_.empty();
      if (more && in_engine_ < options_.depth && !backpressure_) continue;
      if (in_engine_ == 0) {
        // A refusal with nothing in flight has no completion to wait for.
        if (backpressure_) throw IoError(EIO, "the I/O engine takes no requests", options_.path);
        if (stopping_) return;
        work_->wait(lock, [&] { return stopping_ || !reads_.empty() || !writes_.empty(); });
        continue;
      }
      // With a full engine new work changes nothing, so nobody needs to wake it.
      asleep_in_engine_ = in_engine_ < options_.depth && !stopping_;
    }
    completions.clear();
    engine_->wait(completions, std::nullopt);
    {
      std::lock_guard lock(mutex_);
      asleep_in_engine_ = false;
    }
    for (const Completion& completion : completions) handle(completion);
  }
}

// Hands one more block to the engine; false when there is none or no room.
bool IoQueue::refill() {
  if (in_engine_ == options_.depth) return false;
  if (!again_.empty()) {
    const std::size_t slot = again_.front();
    if (!stage(slot)) return false;
    again_.pop_front();
    return true;
  }
  const auto slot = next_flight();
  if (!slot) return false;
  if (stage(*slot)) return true;
  again_.push_back(*slot);
  return false;
}

// Takes a slot for the next block of the current or the next transfer.
std::optional<std::size_t> IoQueue::next_flight() {
  if (free_slots_.empty()) return std::nullopt;
  if (current_ == nullptr) {
    std::lock_guard lock(mutex_);
    while (current_ == nullptr) {
      auto& queue = !reads_.empty() ? reads_ : writes_;
      if (queue.empty()) return std::nullopt;
      if (!queue.front()->withdrawn_) current_ = std::move(queue.front());
      queue.pop_front();
    }
    current_->state_.store(Transfer::State::kRunning, std::memory_order_release);
  }
  const std::size_t slot = free_slots_.back();
  free_slots_.pop_back();
  Transfer& transfer = *current_;
  flights_[slot] = {current_, transfer.next_block_, 0, 0};
  ++transfer.blocks_out_;
  ++transfer.next_block_;
  if (transfer.next_block_ * options_.block_bytes >= transfer.request_.nbytes) current_.reset();
  return slot;
}

bool IoQueue::stage(std::size_t slot) {
  const Flight& flight = flights_[slot];
  const TransferRequest& request = flight.transfer->request_;
  const std::uint64_t at = flight.block * options_.block_bytes + flight.done;
  const std::uint64_t left = block_bytes_of(*flight.transfer, flight.block) - flight.done;
  if (!engine_->stage(
          {request.op, options_.fd, request.address + at, left, request.offset + at, slot})) {
    backpressure_ = true;
    return false;
  }
  ++in_engine_;
  in_flight_.begin(request.op);
  ++counted_.requests;
  return true;
}

void IoQueue::handle(const Completion& completion) {
  const std::size_t slot = completion.tag;
  --in_engine_;
  Flight& flight = flights_[slot];
  in_flight_.end(flight.transfer->request_.op, completion.result);
  if (flight.transfer->error_ || resume(slot, completion.result)) {
    if (flight.transfer->error_) release(slot);
    return;
  }
  const TransferRequest& request = flight.transfer->request_;
  const std::uint64_t length = block_bytes_of(*flight.transfer, flight.block);
  (request.op == IoOp::kRead ? counted_.read_bytes : counted_.write_bytes) += length;
  if (request.op == IoOp::kRead && request.checksums) {
    to_verify_.push_back(slot);
  } else {
    release(slot);
  }
}

// Judges one completion. True when the block is not complete: it was put back, or it failed.
bool IoQueue::resume(std::size_t slot, std::int64_t result) {
  Flight& flight = flights_[slot];
  const TransferRequest& request = flight.transfer->request_;
  const std::uint64_t length = block_bytes_of(*flight.transfer, flight.block);
  const std::uint64_t left = length - flight.done;
  const std::uint64_t at = request.offset + flight.block * options_.block_bytes + flight.done;
  const bool passing = result == -EINTR || result == -EAGAIN;
  if (result < 0 && !passing) {
    fail(*flight.transfer,
         io_error(static_cast<int>(-result), name_of(request.op), options_.path, at, left));
    return true;
  }
  // What arrived beyond the last aligned byte is moved again: a direct request cannot start there.
  const auto moved = static_cast<std::uint64_t>(std::max<std::int64_t>(result, 0));
  const std::uint64_t kept = moved >= left ? left : align_down(moved, options_.alignment);
  flight.done += kept;
  if (flight.done == length) return false;
  flight.stuck = kept == 0 ? flight.stuck + 1 : 0;
  if (flight.stuck >= kMaxStuck) {
    fail(*flight.transfer, io_error(EIO, std::string(name_of(request.op)) + " without progress",
                                    options_.path, at, left));
    return true;
  }
  if (flight.stuck > 1) std::this_thread::sleep_for(pause_before_retry(flight.stuck - 2));
  again_.push_back(slot);
  ++counted_.resumed;
  return true;
}

void IoQueue::verify(const Flight& flight) {
  const TransferRequest& request = flight.transfer->request_;
  const std::uint64_t length = block_bytes_of(*flight.transfer, flight.block);
  const double begin = thread_cpu_s();
  const std::uint32_t read =
      crc32c(0, request.address + flight.block * options_.block_bytes, length);
  counted_.verify_s += thread_cpu_s() - begin;
  const std::uint32_t stored = request.checksums[flight.block];
  if (read != stored) {
    fail(*flight.transfer, mismatch(request, options_.path, flight.block, options_.block_bytes,
                                    length, stored, read));
  }
}

// Remembers the first error and hands out no further block; those in flight come back first.
void IoQueue::fail(Transfer& transfer, IoError error) {
  if (transfer.error_) return;
  transfer.error_ = std::move(error);
  if (current_.get() == &transfer) current_.reset();
  transfer.next_block_ =
      (transfer.request_.nbytes + options_.block_bytes - 1) / options_.block_bytes;
}

void IoQueue::release(std::size_t slot) {
  const std::shared_ptr<Transfer> transfer = std::move(flights_[slot].transfer);
  free_slots_.push_back(slot);
  --transfer->blocks_out_;
  end_if_idle(transfer);
}

void IoQueue::end_if_idle(const std::shared_ptr<Transfer>& transfer) {
  if (transfer->blocks_out_ != 0 ||
      transfer->next_block_ * options_.block_bytes < transfer->request_.nbytes) {
    return;
  }
  {
    std::lock_guard lock(mutex_);
    stats_ = counted_;  // whoever waited for the transfer finds it counted
  }
  end(*transfer, transfer->error_ ? Transfer::State::kFailed : Transfer::State::kDone);
}

void IoQueue::end(Transfer& transfer, Transfer::State state) {
  TransferRequest& request = transfer.request_;
  if (request.on_end) request.on_end(transfer.error_, state == Transfer::State::kCancelled);
  request.on_end = nullptr;
  // Memory and file space go back before anyone learns of the end, so that a waiter finds them.
  request.owner.reset();
  {
    std::lock_guard lock(mutex_);
    transfer.state_.store(state, std::memory_order_release);
    --live_transfers_;
  }
  ended_->notify_all();
}

// The engine itself broke. What it still holds may be written to by the kernel, so the memory of
// those transfers is leaked on purpose rather than reused.
void IoQueue::fail_everything(const IoError& error) {
  std::vector<std::shared_ptr<Transfer>> victims;
  {
    std::lock_guard lock(mutex_);
    broken_ = error;
    victims = withdraw_all();
  }
  std::set<std::shared_ptr<Transfer>> running;
  for (Flight& flight : flights_) {
    if (!flight.transfer) continue;
    new std::shared_ptr<void>(flight.transfer->request_.owner);
    running.insert(flight.transfer);
  }
  if (current_) running.insert(current_);
  victims.insert(victims.end(), running.begin(), running.end());
  for (auto& transfer : victims) {
    if (!transfer->error_) transfer->error_ = error;
    end(*transfer, Transfer::State::kFailed);
  }
}

std::uint64_t IoQueue::block_bytes_of(const Transfer& transfer, std::uint64_t block) const {
  return std::min(options_.block_bytes, transfer.request_.nbytes - block * options_.block_bytes);
}

}  // namespace offload
