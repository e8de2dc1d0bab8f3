// The seam between the queue and the ways a kernel moves bytes. An engine belongs to one thread,
// except for wake(). It moves what it is told and reports what the kernel said; splitting,
// resuming and judging results is the queue's work. A completion without an error is not a
// promise that all bytes arrived: whoever reads `result` must compare it with what was asked.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace offload {

enum class IoOp : std::uint8_t { kRead, kWrite };

inline const char* name_of(IoOp op) { return op == IoOp::kRead ? "read" : "write"; }

struct Request {
  IoOp op;
  int fd;
  std::byte* address;
  std::size_t nbytes;
  std::uint64_t offset;
  std::uint64_t tag;  // comes back in the completion; below kFirstReservedTag
};

inline constexpr std::uint64_t kFirstReservedTag = ~std::uint64_t{0} - 15;

struct Completion {
  std::uint64_t tag;
  std::int64_t result;  // bytes moved, possibly fewer than asked, or -errno
};

class IoEngine {
 public:
  virtual ~IoEngine() = default;

  virtual std::string name() const = 0;
  // Takes a request, or returns false when no more can be in flight: that is backpressure, and
  // never the answer while nothing is in flight.
  virtual bool stage(const Request& request) = 0;
  // Hands everything staged to the kernel. Throws IoError only when the engine itself is broken.
  virtual void submit() = 0;
  // Appends at least one completion, unless wake() was called or `limit` passed.
  virtual void wait(std::vector<Completion>& completions,
                    std::optional<std::chrono::microseconds> limit) = 0;
  // Makes the present or the next wait() return. Any thread.
  virtual void wake() = 0;
  // Lets the kernel keep this memory mapped for I/O; returns 0 or the errno of the refusal.
  virtual int register_memory(std::byte* address, std::size_t nbytes) = 0;
};

// Throws IoError when the kernel has no (usable) io_uring.
std::unique_ptr<IoEngine> make_uring_engine(unsigned depth);
// pread and pwrite on `threads` threads.
std::unique_ptr<IoEngine> make_posix_engine(unsigned depth, unsigned threads);

// What the fault engine does to the requests it is told to, counted per rule in order of staging.
struct FaultRule {
  enum class Action : std::uint8_t { kError, kShort, kDelay, kCorrupt };

  std::optional<IoOp> op;  // nothing: both
  std::uint64_t first = 0;
  std::uint64_t count = 1;
  Action action = Action::kError;
  int code = 5;              // kError: the errno
  std::uint64_t nbytes = 0;  // kShort: bytes let through; kCorrupt: offset of the flipped byte
  double delay_s = 0;        // kDelay
};

struct FaultPlan {
  std::vector<FaultRule> rules;
  double bytes_per_s = 0;  // 0: no limit
  bool discard = false;    // complete every request at once and move nothing
};

std::unique_ptr<IoEngine> make_fault_engine(std::unique_ptr<IoEngine> inner, FaultPlan plan);

}  // namespace offload
