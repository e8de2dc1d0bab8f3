// io_uring by system call alone: the kernel's header is enough, no library is needed.
#include <linux/io_uring.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <utility>

#include "error.h"
#include "fork_guard.h"
#include "io_engine.h"

namespace offload {
namespace {

constexpr std::uint64_t kWakeTag = kFirstReservedTag;
// The kernel takes at most 1 GiB in one registered buffer.
constexpr std::size_t kRegisteredPiece = std::size_t{1} << 30;

IoError ring_error(int code, const char* what) {
  return IoError(code, std::string(what) + " failed: " + std::strerror(code), "io_uring");
}

class RingMapping {
 public:
  RingMapping() = default;
  RingMapping(int fd, std::size_t nbytes, off_t offset) : nbytes_(nbytes) {
    at_ = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
    if (at_ == MAP_FAILED) throw ring_error(errno, "mmap of the ring");
    ::madvise(at_, nbytes, MADV_DONTFORK);
  }
  RingMapping(RingMapping&& other) noexcept
      : at_(std::exchange(other.at_, nullptr)), nbytes_(other.nbytes_) {}
  RingMapping& operator=(RingMapping&& other) noexcept {
    std::swap(at_, other.at_);
    std::swap(nbytes_, other.nbytes_);
    return *this;
  }
  ~RingMapping() {
    if (at_ != nullptr) ::munmap(at_, nbytes_);
  }

  template <typename T>
  T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(at_) + offset);
  }

 private:
  void* at_ = nullptr;
  std::size_t nbytes_ = 0;
};

class Descriptor {
 public:
  Descriptor(const char* call, const std::function<int()>& open) : fd_(open_here(open)) {
    if (fd_ < 0) throw ring_error(errno, call);
  }
  ~Descriptor() { close_here(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

class UringEngine final : public IoEngine {
 public:
  explicit UringEngine(unsigned depth)
      : depth_(depth),
        ring_("io_uring_setup",
              [this] {
                const unsigned entries = std::bit_ceil(depth_ + 1);  // one more, for waking
                return static_cast<int>(::syscall(__NR_io_uring_setup, entries, &params_));
              }),
        event_("eventfd", [] { return ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); }) {
    constexpr unsigned kNeeded =
        IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG | IORING_FEAT_RW_CUR_POS;
    if ((params_.features & kNeeded) != kNeeded) {
      throw ring_error(ENOSYS, "io_uring of this kernel is older than 5.11 and");
    }
    const std::size_t sq_bytes = params_.sq_off.array + params_.sq_entries * sizeof(unsigned);
    const std::size_t cq_bytes = params_.cq_off.cqes + params_.cq_entries * sizeof(io_uring_cqe);
    rings_ = RingMapping(ring_.get(), std::max(sq_bytes, cq_bytes), IORING_OFF_SQ_RING);
    entries_ = RingMapping(ring_.get(), params_.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
    arm_wake();
  }

  std::string name() const override { return "uring"; }

  bool stage(const Request& request) override {
    if (in_flight_ == depth_) return false;
    io_uring_sqe* sqe = next_entry();
    if (sqe == nullptr) return false;
    const bool fixed = registered(request);
    if (request.op == IoOp::kRead) {
      sqe->opcode = fixed ? IORING_OP_READ_FIXED : IORING_OP_READ;
    } else {
      sqe->opcode = fixed ? IORING_OP_WRITE_FIXED : IORING_OP_WRITE;
    }
    sqe->fd = request.fd;
    sqe->off = request.offset;
    sqe->addr = reinterpret_cast<std::uint64_t>(request.address);
    sqe->len = static_cast<std::uint32_t>(request.nbytes);
    if (fixed) sqe->buf_index = static_cast<std::uint16_t>(piece_of(request.address));
    sqe->user_data = request.tag;
    ++in_flight_;
    return true;
  }

  void submit() override {
    while (unsubmitted_ != 0) {
      const long taken = enter(unsubmitted_, 0, 0, nullptr, 0);
      if (taken < 0) {
        if (errno == EINTR) continue;
        // The kernel is short of memory or of completion room; both pass when completions are
        // taken, which the next wait() does.
        if (errno == EAGAIN || errno == EBUSY) return;
        throw ring_error(errno, "io_uring_enter");
      }
      unsubmitted_ -= static_cast<unsigned>(taken);
    }
  }

  void wait(std::vector<Completion>& completions,
            std::optional<std::chrono::microseconds> limit) override {
    if (take(completions)) return;
    __kernel_timespec deadline{};
    io_uring_getevents_arg argument{};
    if (limit) {
      deadline.tv_sec = limit->count() / 1'000'000;
      deadline.tv_nsec = limit->count() % 1'000'000 * 1000;
      argument.ts = reinterpret_cast<std::uint64_t>(&deadline);
    }
    const long done = enter(unsubmitted_, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG,
                            &argument, sizeof argument);
    if (done >= 0) {  // what was submitted, also when the waiting itself was cut short
      unsubmitted_ -= std::min(unsubmitted_, static_cast<unsigned>(done));
    } else if (errno != EINTR && errno != ETIME && errno != EAGAIN && errno != EBUSY) {
      throw ring_error(errno, "io_uring_enter");
    }
    take(completions);
  }

  void wake() override {
    const std::uint64_t one = 1;
    // A full counter wakes as well, so EAGAIN is as good as success.
    [[maybe_unused]] const ssize_t written = ::write(event_.get(), &one, sizeof one);
  }

  int register_memory(std::byte* address, std::size_t nbytes) override {
    std::vector<iovec> pieces;
    for (std::size_t at = 0; at < nbytes; at += kRegisteredPiece) {
      pieces.push_back({address + at, std::min(kRegisteredPiece, nbytes - at)});
    }
    const long code = ::syscall(__NR_io_uring_register, ring_.get(), IORING_REGISTER_BUFFERS,
                                pieces.data(), static_cast<unsigned>(pieces.size()));
    if (code < 0) return errno;
    registered_ = address;
    registered_bytes_ = nbytes;
    return 0;
  }

 private:
  long enter(unsigned submitted, unsigned wanted, unsigned flags, void* argument,
             std::size_t argument_bytes) {
    return ::syscall(__NR_io_uring_enter, ring_.get(), submitted, wanted, flags, argument,
                     argument_bytes);
  }

  std::size_t piece_of(const std::byte* address) const {
    return static_cast<std::size_t>(address - registered_) / kRegisteredPiece;
  }

  bool registered(const Request& request) const {
    return registered_ != nullptr && request.address >= registered_ &&
           request.address + request.nbytes <= registered_ + registered_bytes_ &&
           piece_of(request.address) == piece_of(request.address + request.nbytes - 1);
  }

  unsigned pending_entries() const {
    const unsigned tail = *rings_.at<unsigned>(params_.sq_off.tail);
    return tail - __atomic_load_n(rings_.at<unsigned>(params_.sq_off.head), __ATOMIC_ACQUIRE);
  }

  io_uring_sqe* next_entry() {
    if (pending_entries() == params_.sq_entries) return nullptr;
    unsigned* tail = rings_.at<unsigned>(params_.sq_off.tail);
    const unsigned index = *tail & (params_.sq_entries - 1);
    io_uring_sqe* sqe = entries_.at<io_uring_sqe>(index * sizeof(io_uring_sqe));
    std::memset(sqe, 0, sizeof *sqe);
    rings_.at<unsigned>(params_.sq_off.array)[index] = index;
    // The kernel reads entries only inside enter() on this thread, so the entry may still be
    // filled in after the tail has moved.
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
    ++unsubmitted_;
    return sqe;
  }

  void arm_wake() {
    io_uring_sqe* sqe = next_entry();
    if (sqe == nullptr) return;  // cannot happen: one entry is kept for this
    sqe->opcode = IORING_OP_POLL_ADD;
    sqe->fd = event_.get();
    sqe->poll32_events = POLLIN;
    sqe->user_data = kWakeTag;
  }

  // Returns whether wait() has something to return for.
  bool take(std::vector<Completion>& completions) {
    bool any = false;
    unsigned* head_at = rings_.at<unsigned>(params_.cq_off.head);
    const auto* cqes = rings_.at<io_uring_cqe>(params_.cq_off.cqes);
    unsigned head = *head_at;
    const unsigned tail =
        __atomic_load_n(rings_.at<unsigned>(params_.cq_off.tail), __ATOMIC_ACQUIRE);
    for (; head != tail; ++head) {
      const io_uring_cqe& cqe = cqes[head & (params_.cq_entries - 1)];
      any = true;
      if (cqe.user_data == kWakeTag) {
        std::uint64_t count;
        [[maybe_unused]] const ssize_t got = ::read(event_.get(), &count, sizeof count);
        rearm_ = true;
        continue;
      }
      completions.push_back({cqe.user_data, cqe.res});
      --in_flight_;
    }
    __atomic_store_n(head_at, head, __ATOMIC_RELEASE);
    if (rearm_) {
      rearm_ = false;
      arm_wake();
    }
    return any;
  }

  unsigned depth_;
  io_uring_params params_{};
  Descriptor ring_;
  Descriptor event_;
  RingMapping rings_;
  RingMapping entries_;
  std::byte* registered_ = nullptr;
  std::size_t registered_bytes_ = 0;
  unsigned in_flight_ = 0;
  unsigned unsubmitted_ = 0;
  bool rearm_ = false;
};

}  // namespace

std::unique_ptr<IoEngine> make_uring_engine(unsigned depth) {
  return std::make_unique<UringEngine>(depth);
}

}  // namespace offload
