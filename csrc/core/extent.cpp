#include <algorithm>
#include <cstring>
#include <utility>

#include "clock.h"
#include "fork_guard.h"
#include "spill.h"
#include "spill_state.h"

namespace offload {
Extent::~Extent() {
  if (!spill_ || spill_->fork_generation_ != fork_generation()) return;
  std::vector<std::shared_ptr<Transfer>> writes;
  {
    std::lock_guard lock(shared_->mutex);
    for (Piece& piece : shared_->pieces) {
      if (piece.write && !piece.write->ended()) writes.push_back(piece.write);
    }
  }
  // Nobody will read it, so what has not begun need not be written.
  for (auto& write : writes) spill_->queue_->try_cancel(*write);
  if (read_ && !read_->ended()) spill_->queue_->try_cancel(*read_);
}

std::uint64_t Extent::offset() const { return shared_->range->offset; }

bool Extent::whole_in_memory() const {
  return shared_->pieces.size() == 1 && shared_->pieces[0].slice != nullptr;
}

bool Extent::written() const {
  return std::all_of(shared_->pieces.begin(), shared_->pieces.end(),
                     [](const Piece& piece) { return piece.write && piece.write->ended(); });
}

bool Extent::ready() const {
  spill_->check_process();
  return held_ || (read_ && read_->ended());
}

void Extent::wait_written() {
  spill_->check_process();
  std::vector<std::shared_ptr<Transfer>> writes;
  {
    std::lock_guard lock(shared_->mutex);
    for (const Piece& piece : shared_->pieces) {
      if (piece.write) writes.push_back(piece.write);
    }
  }
  for (const auto& write : writes) {
    try {
      spill_->queue_->wait(*write);
    } catch (const IoError& error) {
      // A full drive keeps the bytes in memory, and a cancelled write too.
      if (!is_no_space(error.code()) && error.code() != ECANCELED) throw;
    }
  }
}

// Of an extent that nobody else has yet: its bytes are to come from this slice.
void Extent::fill_in(const std::shared_ptr<Arena>& arena, std::shared_ptr<Slice> slice) {
  filling_ = std::make_shared<Spill::StagedWrite>(arena, slice);
  shared_->pieces.push_back({0, extent_bytes_, std::move(slice), nullptr, false});
}

Restored Extent::staged() {
  std::lock_guard lock(shared_->mutex);
  if (!filling_) throw std::logic_error("nothing is to be put into this extent any more");
  const auto& slice = shared_->pieces[0].slice;
  return {slice, slice->data() + lead_, nbytes_, false};
}

void Extent::start_write() {
  spill_->check_process();
  std::shared_ptr<Spill::StagedWrite> staged;
  {
    std::lock_guard lock(shared_->mutex);
    staged = std::static_pointer_cast<Spill::StagedWrite>(std::exchange(filling_, nullptr));
  }
  if (!staged) return;
  spill_->fill_piece(*this, 0, nullptr);
  std::unique_lock lock(shared_->mutex);
  if (unwanted_) return;
  lock.unlock();
  spill_->submit_piece(*this, 0, std::move(staged));
}

// Reads [begin, begin + nbytes) of the extent to the same place in `slice`.
std::shared_ptr<Transfer> Extent::start_read(std::shared_ptr<Slice> slice, std::uint64_t begin,
                                             std::uint64_t nbytes) {
  TransferRequest request;
  request.op = IoOp::kRead;
  request.address = slice->data() + begin;
  request.nbytes = nbytes;
  request.offset = shared_->range->offset + begin;
  if (!shared_->checksums.empty()) {
    request.checksums = shared_->checksums.data() + begin / spill_->options_.block_bytes;
  }
  request.owner = std::make_shared<std::pair<std::shared_ptr<Shared>, std::shared_ptr<Slice>>>(
      shared_, std::move(slice));
  return spill_->queue_->submit(std::move(request), /*lazy=*/true);
}

bool Extent::prefetch() {
  spill_->check_process();
  if (read_ || held_ || !handed_out_.expired()) return true;
  held_ = forward();
  if (held_) return true;
  {
    std::lock_guard lock(shared_->mutex);
    if (!written()) return false;
    // A piece still in memory never reached the drive: fetch() puts it together or says why not.
    for (const Piece& piece : shared_->pieces) {
      if (piece.slice) return false;
    }
  }
  auto slice = spill_->arena_->try_allocate(extent_bytes_);
  if (slice == nullptr) return false;
  read_ = start_read(slice, 0, extent_bytes_);
  read_slice_ = std::move(slice);
  return true;
}

// Hands back the staging copy while it exists. A write that has not begun is dropped, and then
// that copy is the tensor's only one and stays with the extent.
std::optional<Restored> Extent::forward() {
  std::shared_ptr<Slice> slice;
  std::shared_ptr<Transfer> write;
  std::shared_ptr<void> filling;  // let go of without the lock
  {
    std::lock_guard lock(shared_->mutex);
    if (!whole_in_memory()) return std::nullopt;
    slice = shared_->pieces[0].slice;
    write = shared_->pieces[0].write;
    filling = std::exchange(filling_, nullptr);
    unwanted_ = write == nullptr;
  }
  const bool cancelled =
      write ? !write->ended() && spill_->queue_->try_cancel(*write) : filling != nullptr;
  if (cancelled) {
    std::lock_guard lock(spill_->space_->mutex);
    spill_->space_->counters.cancelled_bytes += nbytes_;
  }
  return hand_out(std::move(slice), true);
}

Restored Extent::hand_out(std::shared_ptr<Slice> slice, bool forwarded) {
  handed_out_ = slice;
  std::byte* first = slice->data() + lead_;
  return {std::move(slice), first, nbytes_, forwarded};
}

void Extent::copy_unwritten(std::byte* to) const {
  for (const Piece& piece : shared_->pieces) {
    if (piece.slice) std::memcpy(to + piece.begin, piece.slice->data(), piece.nbytes);
  }
}

Restored Extent::fetch() {
  spill_->check_process();
  spill_->raise_write_error();
  const bool at_once = ready();
  const double begin = at_once ? 0 : wall_s();
  Restored restored = obtain();
  std::lock_guard lock(spill_->space_->mutex);
  SpillStats& counters = spill_->space_->counters;
  (restored.forwarded ? counters.forwarded_bytes : counters.reloaded_bytes) += nbytes_;
  if (!at_once) counters.read_wait_s += wall_s() - begin;
  return restored;
}

Restored Extent::obtain() {
  if (held_) return *std::exchange(held_, std::nullopt);
  if (!read_) {
    if (auto slice = handed_out_.lock()) return hand_out(std::move(slice), true);
    if (auto restored = forward()) return *restored;
    wait_written();
    auto slice = spill_->arena_->try_allocate(extent_bytes_);
    if (slice == nullptr) slice = spill_->arena_->allocate_outside(extent_bytes_);
    bool holes = false;
    {
      std::lock_guard lock(shared_->mutex);
      for (const Piece& piece : shared_->pieces) holes |= piece.slice != nullptr;
    }
    if (holes) {
      // Some pieces never reached the drive: the others are read one by one around them.
      for (Piece& piece : shared_->pieces) {
        if (piece.slice) continue;
        spill_->queue_->wait(*start_read(slice, piece.begin, piece.nbytes));
      }
      std::lock_guard lock(shared_->mutex);
      copy_unwritten(slice->data());
      return hand_out(std::move(slice), false);
    }
    read_ = start_read(slice, 0, extent_bytes_);
    read_slice_ = std::move(slice);
  }
  const auto read = std::exchange(read_, nullptr);
  auto slice = std::exchange(read_slice_, nullptr);
  spill_->queue_->wait(*read);
  return hand_out(std::move(slice), false);
}

}  // namespace offload
