#include "arena.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <new>

#include "align.h"

namespace offload {

HostMapping::HostMapping(std::size_t nbytes)
    : nbytes_(align_up(std::max<std::size_t>(nbytes, 1), kPageBytes)),
      fork_generation_(fork_generation()) {
  void* at = ::mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::byte*>(at);
  ::madvise(at, nbytes_, MADV_DONTFORK);
  // Fewer faults and shorter page lists for the drive; where huge pages are off nothing changes.
  if (nbytes_ >= kHugePageBytes) ::madvise(at, nbytes_, MADV_HUGEPAGE);
}

HostMapping::~HostMapping() {
  if (fork_generation_ == fork_generation()) ::munmap(data_, nbytes_);
}

Slice::~Slice() {
  if (arena_) arena_->give_back(*this);
}

std::shared_ptr<Arena> Arena::create(std::size_t capacity) {
  return std::shared_ptr<Arena>(new Arena(align_up(capacity, kPageBytes)));
}

Arena::Arena(std::size_t capacity)
    : mapping_(capacity), fork_generation_(fork_generation()), allocator_(mapping_.nbytes()) {}

std::shared_ptr<Slice> Arena::try_allocate(std::size_t nbytes) {
  const std::size_t whole = align_up(nbytes, kPageBytes);
  std::shared_ptr<Slice> slice(new Slice);
  std::lock_guard lock(mutex_);
  const std::uint64_t used = allocator_.used() + outside_;
  if (used != 0 && used + whole > limit_.load()) return nullptr;
  const auto offset = allocator_.allocate(whole);
  if (!offset) return nullptr;
  slice->arena_ = shared_from_this();
  slice->data_ = mapping_.data() + *offset;
  slice->nbytes_ = whole;
  note_peak();
  return slice;
}

bool Arena::within_limit() const {
  std::lock_guard lock(mutex_);
  return allocator_.used() + outside_ <= limit_.load();
}

std::shared_ptr<Slice> Arena::allocate_outside(std::size_t nbytes) {
  std::shared_ptr<Slice> slice(new Slice);
  slice->mapping_ = std::make_unique<HostMapping>(nbytes);
  slice->data_ = slice->mapping_->data();
  slice->nbytes_ = slice->mapping_->nbytes();
  std::lock_guard lock(mutex_);
  slice->arena_ = shared_from_this();
  outside_ += slice->nbytes_;
  note_peak();
  return slice;
}

void Arena::give_back(Slice& slice) {
  if (fork_generation_ != fork_generation()) return;  // the mutex may be held by a lost thread
  slice.mapping_.reset();
  {
    std::lock_guard lock(mutex_);
    if (slice.data_ >= mapping_.data() && slice.data_ < mapping_.data() + mapping_.nbytes()) {
      allocator_.release(static_cast<std::uint64_t>(slice.data_ - mapping_.data()), slice.nbytes_);
    } else {
      outside_ -= slice.nbytes_;
    }
    ++releases_;
  }
  released_->notify_all();
}

void Arena::wait_release(std::uint64_t seen, std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  released_->wait_for(lock, limit, [&] { return releases_ != seen; });
}

std::uint64_t Arena::releases() const {
  std::lock_guard lock(mutex_);
  return releases_;
}

void Arena::mark_resident() {
  std::lock_guard lock(mutex_);
  resident_ = true;
  note_peak();
}

int Arena::numa_node() {
  volatile std::byte* first = mapping_.data();
  *first = *first;
  int node = -1;
  const long code = ::syscall(SYS_get_mempolicy, &node, nullptr, 0UL, mapping_.data(),
                              static_cast<unsigned long>(MPOL_F_NODE | MPOL_F_ADDR));
  return code == 0 ? node : -1;
}

void Arena::trim() {
  std::lock_guard lock(mutex_);
  if (allocator_.used() != 0) return;
  ::madvise(mapping_.data(), mapping_.nbytes(), MADV_DONTNEED);
  resident_ = false;
  allocator_.forget_high_water();
}

std::uint64_t Arena::native_now() const {
  // A huge page is resident as a whole once any of it is touched.
  const std::uint64_t touched =
      resident_ ? mapping_.nbytes()
                : std::min<std::uint64_t>(align_up(allocator_.high_water(), kHugePageBytes),
                                          mapping_.nbytes());
  return touched + outside_;
}

void Arena::note_peak() { native_peak_ = std::max(native_peak_, native_now()); }

ArenaStats Arena::stats() const {
  std::lock_guard lock(mutex_);
  return {mapping_.nbytes(), allocator_.used(), allocator_.peak_used(),
          outside_,          native_now(),      native_peak_};
}

}  // namespace offload
