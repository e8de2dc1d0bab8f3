#include "spill.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <utility>

#include "align.h"
#include "clock.h"
#include "crc32c.h"
#include "fork_guard.h"
#include "spill_state.h"

namespace offload {
namespace {

constexpr unsigned kPosixThreads = 4;
// Extending a file a little at a time serialises writers on ext4; a step is reserved at once.
constexpr std::uint64_t kReserveStep = std::uint64_t{256} << 20;
// One request carries a block, and the kernel moves less than 2 GiB in one request.
constexpr std::uint64_t kMaxBlockBytes = std::uint64_t{1} << 30;
// When staging cannot hold a tensor in one run it goes through in pieces of so many blocks.
constexpr std::uint64_t kPieceBlocks = 4;

// Asking for CPU time would cost more than a small copy; there the plain clock serves.
constexpr std::uint64_t kCpuClockBytes = 256 << 10;

double copy_clock_s(std::uint64_t nbytes) {
  return nbytes < kCpuClockBytes ? wall_s() : thread_cpu_s();
}

}  // namespace

std::shared_ptr<Spill> Spill::open(SpillOptions options, std::shared_ptr<Arena> arena) {
  return std::shared_ptr<Spill>(new Spill(std::move(options), std::move(arena)));
}

Spill::Spill(SpillOptions options, std::shared_ptr<Arena> arena)
    : options_(std::move(options)),
      arena_(std::move(arena)),
      fork_generation_(fork_generation()),
      space_(std::make_shared<Space>()) {
  if (options_.block_bytes == 0 || options_.block_bytes % kPageBytes != 0 ||
      options_.block_bytes > kMaxBlockBytes) {
    throw std::invalid_argument("block_bytes must be a multiple of 4096 from 4096 to 1 GiB, not " +
                                std::to_string(options_.block_bytes));
  }
  if (options_.queue_depth == 0 || options_.queue_depth > 4096) {
    throw std::invalid_argument("queue_depth must be from 1 to 4096, not " +
                                std::to_string(options_.queue_depth));
  }
  file_ = std::make_unique<SpillFile>(options_.directory, options_.direct);
  limit_ = options_.spill_bytes != 0 ? options_.spill_bytes : file_->facts().free_bytes / 2;
  limit_ = align_down(limit_, kPageBytes);
  auto engine = choose_engine();
  register_code_ = ECANCELED;
  if (options_.register_buffers && arena_->capacity() != 0) {
    register_code_ = engine->register_memory(arena_->data(), arena_->capacity());
    if (register_code_ == 0) arena_->mark_resident();
  }
  engine_name_ = engine->name();
  queue_ = std::make_unique<IoQueue>(
      std::move(engine), IoQueue::Options{file_->fd(), file_->path(), options_.block_bytes,
                                          file_->alignment(), options_.queue_depth, options_.poll});
  arena_->add_user();
}

Spill::~Spill() {
  if (fork_generation_ == fork_generation()) close();
}

std::unique_ptr<IoEngine> Spill::choose_engine() {
  std::unique_ptr<IoEngine> engine;
  if (options_.engine == "auto" || options_.engine == "uring") {
    try {
      engine = make_uring_engine(options_.queue_depth);
      engine_reason_ = options_.engine == "uring" ? "asked for" : "io_uring works here";
    } catch (const IoError& error) {
      if (options_.engine == "uring") throw;
      engine_reason_ = error.what();
    }
  } else if (options_.engine == "posix") {
    engine_reason_ = "asked for";
  } else {
    throw std::invalid_argument("engine must be auto, uring or posix, not '" + options_.engine +
                                "'");
  }
  if (!engine) engine = make_posix_engine(options_.queue_depth, kPosixThreads);
  if (options_.faults) engine = make_fault_engine(std::move(engine), *options_.faults);
  return engine;
}

bool Spill::grow(std::uint64_t nbytes) {
  const std::uint64_t reserved = space_->extents.capacity();
  const bool limit_was_set = options_.spill_bytes != 0;
  const std::uint64_t left = room_to_grow(
      limit_, reserved, limit_was_set ? std::nullopt : std::optional(file_->free_bytes()));
  // A step need not be used up: the last free range of the file may be continued by it.
  for (const std::uint64_t step : {std::max(kReserveStep, nbytes), nbytes}) {
    const std::uint64_t grown = std::min(align_up(step, kPageBytes), left);
    if (grown == 0) return false;
    const int code = file_->reserve(reserved, grown);
    if (code == 0) {
      space_->extents.grow(grown);
      return true;
    }
    if (code == EBADF) throw std::runtime_error("the spill is closed");
    if (!is_no_space(code)) throw io_error(code, "reservation", file_->path(), reserved, grown);
  }
  return false;
}

std::shared_ptr<Spill::FileRange> Spill::allocate(std::uint64_t nbytes) {
  std::lock_guard lock(space_->mutex);
  auto offset = space_->extents.allocate(nbytes);
  while (!offset && grow(nbytes)) offset = space_->extents.allocate(nbytes);
  if (!offset) return nullptr;
  return std::make_shared<FileRange>(space_, *offset, nbytes);
}

// Waits for staging memory to come back from finished writes, to any directory. nullptr when none
// is in flight: waiting would be for ever (restored tensors hold the arena).
std::shared_ptr<Slice> Spill::wait_for_room(std::uint64_t nbytes) {
  for (;;) {
    const std::uint64_t seen = arena_->releases();
    if (auto slice = arena_->try_allocate(nbytes)) return slice;
    if (!arena_->writing()) return arena_->try_allocate(nbytes);  // one may have ended just now
    wait_for_writes(seen);
  }
}

void Spill::wait_within_limit() {
  for (;;) {
    const std::uint64_t seen = arena_->releases();
    if (arena_->within_limit() || !arena_->writing()) return;
    wait_for_writes(seen);
  }
}

// Returns when staging memory has come back since `seen`, or after a while.
void Spill::wait_for_writes(std::uint64_t seen) {
  queue_->flush();
  const double begin = wall_s();
  arena_->wait_release(seen, std::chrono::milliseconds(20));
  {
    std::lock_guard lock(space_->mutex);
    space_->counters.write_wait_s += wall_s() - begin;
  }
  if (options_.poll) options_.poll();
}

// The same, or memory outside of the arena.
std::shared_ptr<Slice> Spill::stage_memory(std::uint64_t nbytes) {
  auto slice = wait_for_room(nbytes);
  return slice ? slice : arena_->allocate_outside(nbytes);
}

// Space in the file for an extent, and nothing else yet; nullptr where there is none.
std::shared_ptr<Extent> Spill::make_extent(std::uint64_t nbytes, std::uint64_t lead) {
  check_process();
  if (closed_) throw std::runtime_error("the spill is closed");
  raise_write_error();
  if (nbytes == 0) throw std::invalid_argument("an extent of 0 bytes cannot be written");
  const std::uint64_t whole = align_up(lead + nbytes, kPageBytes);
  auto range = allocate(whole);
  if (!range) return nullptr;

  std::shared_ptr<Extent> extent(new Extent);
  extent->spill_ = shared_from_this();
  extent->shared_ = std::make_shared<Extent::Shared>();
  extent->shared_->range = std::move(range);
  extent->lead_ = lead;
  extent->nbytes_ = nbytes;
  extent->extent_bytes_ = whole;
  if (options_.verify) {
    extent->shared_->checksums.resize((whole + options_.block_bytes - 1) / options_.block_bytes);
  }
  return extent;
}

std::shared_ptr<Extent> Spill::write(const std::byte* source, std::uint64_t nbytes) {
  auto extent = make_extent(nbytes, reinterpret_cast<std::uintptr_t>(source) % kTensorAlign);
  if (!extent) return nullptr;
  const std::uint64_t whole = extent->extent_bytes_;
  auto& pieces = extent->shared_->pieces;
  if (auto slice = arena_->try_allocate(whole)) {
    pieces.push_back({0, whole, std::move(slice), nullptr, false});
    fill_piece(*extent, 0, source);
    submit_piece(*extent, 0, std::make_shared<StagedWrite>(arena_, pieces[0].slice));
    return extent;
  }
  const std::uint64_t step = kPieceBlocks * options_.block_bytes;
  pieces.reserve((whole + step - 1) / step);
  for (std::uint64_t begin = 0; begin < whole; begin += step) {
    const std::uint64_t length = std::min(step, whole - begin);
    auto slice = stage_memory(length);
    {
      std::lock_guard lock(extent->shared_->mutex);
      pieces.push_back({begin, length, std::move(slice), nullptr, false});
    }
    fill_piece(*extent, pieces.size() - 1, source);
    submit_piece(*extent, pieces.size() - 1,
                 std::make_shared<StagedWrite>(arena_, pieces.back().slice));
  }
  return extent;
}

std::shared_ptr<Extent> Spill::reserve(std::uint64_t nbytes) {
  auto extent = make_extent(nbytes, 0);
  if (extent) extent->shared_->checksums.clear();  // nothing that passes here to make them from
  return extent;
}

std::shared_ptr<Extent> Spill::stage(std::uint64_t nbytes, std::uint64_t lead) {
  if (lead >= kTensorAlign) {
    throw std::invalid_argument("lead must be below 64, not " + std::to_string(lead));
  }
  auto extent = make_extent(nbytes, lead);
  if (!extent) return nullptr;
  auto slice = wait_for_room(extent->extent_bytes_);
  if (!slice) return nullptr;
  extent->fill_in(arena_, std::move(slice));
  return extent;
}

std::shared_ptr<Extent> Spill::restage(const Restored& bytes) {
  const auto lead = static_cast<std::uint64_t>(bytes.address - bytes.slice->data());
  auto extent = make_extent(bytes.nbytes, lead);
  if (!extent) return nullptr;
  if (lead >= kTensorAlign || extent->extent_bytes_ > bytes.slice->nbytes()) {
    throw std::invalid_argument("these bytes are not all of what was fetched");
  }
  extent->fill_in(arena_, bytes.slice);
  return extent;
}

// Fills a piece's slice block by block from the tensor, and makes the checksums; without a `source`
// the bytes are there already.
void Spill::fill_piece(Extent& extent, std::size_t index, const std::byte* source) {
  const auto shared = extent.shared_;
  Extent::Piece& piece = shared->pieces[index];
  const double begin = copy_clock_s(piece.nbytes);
  std::byte* to = piece.slice->data();
  const std::uint64_t data_begin = extent.lead_;
  const std::uint64_t data_end = extent.lead_ + extent.nbytes_;
  for (std::uint64_t at = piece.begin; at < piece.begin + piece.nbytes;
       at += options_.block_bytes) {
    const std::uint64_t end = std::min(at + options_.block_bytes, piece.begin + piece.nbytes);
    const std::uint64_t first = std::clamp(data_begin, at, end);
    const std::uint64_t last = std::clamp(data_end, at, end);
    std::byte* block = to + (at - piece.begin);
    std::memset(block, 0, first - at);
    std::memset(block + (last - at), 0, end - last);
    if (source == nullptr) {
      if (!shared->checksums.empty()) {
        shared->checksums[at / options_.block_bytes] = crc32c(0, block, end - at);
      }
      continue;
    }
    const std::byte* from = source + (first - data_begin);
    if (shared->checksums.empty()) {
      copy_stream(block + (first - at), from, last - first);
    } else {
      std::uint32_t crc = crc32c(0, block, first - at);
      crc = copy_crc32c(crc, block + (first - at), from, last - first);
      shared->checksums[at / options_.block_bytes] = crc32c(crc, block + (last - at), end - last);
    }
  }
  const double copied = copy_clock_s(piece.nbytes) - begin;
  std::lock_guard lock(space_->mutex);
  space_->counters.copy_s += copied;
}

void Spill::submit_piece(Extent& extent, std::size_t index, std::shared_ptr<StagedWrite> staged) {
  const auto shared = extent.shared_;
  TransferRequest request;
  request.op = IoOp::kWrite;
  request.address = staged->slice->data();
  request.nbytes = shared->pieces[index].nbytes;
  request.offset = shared->range->offset + shared->pieces[index].begin;
  request.owner = shared;
  // `shared` is the transfer's owner, so it outlives this call; the slice is named in `staged`, so
  // that it comes back to the arena when the transfer ends even if the extent is long gone.
  request.on_end = [space = space_, state = shared.get(), index, staged = std::move(staged)](
                       const std::optional<IoError>& error, bool cancelled) {
    // A cancelled write leaves its staging copy with the extent.
    if (!cancelled) end_write(*space, *state, index, *staged->arena, error);
  };
  // One directory's small write must not keep the memory that another directory waits for.
  auto write = queue_->submit(std::move(request), /*lazy=*/!arena_->shared());
  std::lock_guard lock(shared->mutex);
  shared->pieces[index].write = std::move(write);
}

// Staging must not fill up with what cannot be written, so its copy moves out of the arena, if
// there is any other memory.
std::shared_ptr<Slice> Spill::move_outside(Arena& arena, std::shared_ptr<Slice> staged) {
  if (staged->outside()) return staged;
  try {
    auto moved = arena.allocate_outside(staged->nbytes());
    std::memcpy(moved->data(), staged->data(), staged->nbytes());
    return moved;
  } catch (const std::bad_alloc&) {
    return staged;
  }
}

// On the queue's thread.
void Spill::end_write(Space& space, Extent::Shared& shared, std::size_t piece, Arena& arena,
                      const std::optional<IoError>& error) {
  if (error && !is_no_space(error->code())) {
    std::lock_guard lock(space.mutex);
    if (!space.write_error) space.write_error = error;
    space.write_failed.store(true);
    return;
  }
  std::shared_ptr<Slice> staged;
  {
    std::lock_guard lock(shared.mutex);
    staged = shared.pieces[piece].slice;
  }
  std::shared_ptr<Slice> kept = error ? move_outside(arena, staged) : nullptr;
  {
    std::lock_guard lock(shared.mutex);
    shared.pieces[piece].slice = kept;
    shared.pieces[piece].no_space = error.has_value();
  }
  if (error) {
    std::lock_guard lock(space.mutex);
    space.counters.kept_bytes += shared.pieces[piece].nbytes;
    space.counters.kept_total_bytes += shared.pieces[piece].nbytes;
  }
}

std::optional<IoError> Spill::write_error() const {
  if (!space_->write_failed.load()) return std::nullopt;
  std::lock_guard lock(space_->mutex);
  return space_->write_error;
}

void Spill::forget_write_error() {
  std::lock_guard lock(space_->mutex);
  space_->write_error.reset();
  space_->write_failed.store(false);
}

void Spill::raise_write_error() const {
  if (const auto error = write_error()) throw *error;
}

void Spill::check_process() const { queue_->check_process(); }

void Spill::flush() { queue_->flush(); }

void Spill::drain() { queue_->drain(); }

void Spill::close() {
  check_process();
  std::lock_guard lock(close_mutex_);  // a second caller returns when all is done, too
  if (closed_.exchange(true)) return;
  queue_->close();
  // Nothing is in flight any more, so the space goes back even while tensors still name extents.
  file_->close();
  if (arena_->remove_user() == 0) arena_->trim();
}

SpillStats Spill::stats() const {
  check_process();
  SpillStats stats;
  {
    std::lock_guard lock(space_->mutex);
    stats = space_->counters;
    stats.used_bytes = space_->extents.used();
    stats.peak_used_bytes = space_->extents.peak_used();
    stats.reserved_bytes = space_->extents.capacity();
    stats.limit_bytes = limit_;
  }
  stats.queue = queue_->stats();
  return stats;
}

}  // namespace offload
