// The engines themselves, one contract for all: backpressure, waking, limits, the kernel's own
// results; then io_uring's registered memory and the fault engine's script.
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "arena.h"
#include "check.h"
#include "error.h"
#include "file.h"
#include "io_engine.h"

using namespace offload;
using std::chrono::microseconds;

namespace {

constexpr std::size_t kPage = 4096;

std::unique_ptr<IoEngine> make_engine(const std::string& name, unsigned depth) {
  if (name == "posix") return make_posix_engine(depth, 2);
  if (name == "uring") return make_uring_engine(depth);
  return make_fault_engine(make_engine(name.substr(6), depth), {});
}

struct Rig {
  check::Directory directory;
  SpillFile file{directory.path, true};
  HostMapping memory{64 * kPage};
  std::unique_ptr<IoEngine> engine;

  explicit Rig(std::unique_ptr<IoEngine> made) : engine(std::move(made)) {
    file.reserve(0, 64 * kPage);
    for (std::size_t i = 0; i < memory.nbytes(); ++i) memory.data()[i] = std::byte(1 + i / kPage);
  }
  Request page(IoOp op, std::uint64_t index) const {
    return {op, file.fd(), memory.data() + index * kPage, kPage, index * kPage, index};
  }
  std::vector<Completion> collect(std::size_t count) {
    std::vector<Completion> all;
    engine->submit();
    while (all.size() < count) engine->wait(all, std::nullopt);
    std::sort(all.begin(), all.end(), [](auto& a, auto& b) { return a.tag < b.tag; });
    return all;
  }
  std::int64_t result_of(const Request& request) {
    CHECK(engine->stage(request));
    return collect(1)[0].result;
  }
};

void takes_as_many_as_its_depth_and_then_refuses(const std::string& name) {
  for (const unsigned depth : {1u, 2u, 5u, 32u}) {
    Rig rig(make_engine(name, depth));
    for (int round = 0; round < 3; ++round) {
      for (unsigned i = 0; i < depth; ++i) CHECK(rig.engine->stage(rig.page(IoOp::kWrite, i)));
      CHECK(!rig.engine->stage(rig.page(IoOp::kWrite, depth)));
      const auto completions = rig.collect(depth);
      CHECK_EQ(completions.size(), depth);
      for (unsigned i = 0; i < depth; ++i) {
        CHECK_EQ(completions[i].tag, i);
        CHECK_EQ(completions[i].result, std::int64_t(kPage));
      }
    }
  }
}

void a_wake_before_or_while_waiting_ends_the_wait(const std::string& name) {
  Rig rig(make_engine(name, 4));
  std::vector<Completion> none;
  for (int round = 0; round < 50; ++round) {
    rig.engine->wake();
    rig.engine->wait(none, std::nullopt);
    std::thread waker([&] { rig.engine->wake(); });
    rig.engine->wait(none, std::nullopt);
    waker.join();
  }
  for (int i = 0; i < 5000; ++i) rig.engine->wake();  // they may count as one
  rig.engine->wait(none, std::nullopt);
  CHECK(none.empty());
  CHECK_EQ(rig.result_of(rig.page(IoOp::kWrite, 3)), std::int64_t(kPage));
}

void a_wait_with_a_limit_comes_back_empty(const std::string& name) {
  Rig rig(make_engine(name, 4));
  std::vector<Completion> none;
  rig.engine->wait(none, microseconds(200));
  CHECK(none.empty());
}

void reports_what_the_kernel_says(const std::string& name) {
  Rig rig(make_engine(name, 4));
  Request request = rig.page(IoOp::kRead, 0);
  request.fd = -1;
  CHECK_EQ(rig.result_of(request), -std::int64_t{EBADF});
  request = rig.page(IoOp::kRead, 0);
  request.offset = 1 << 30;  // past the end
  CHECK_EQ(rig.result_of(request), 0);
  if (rig.file.direct()) {
    request = rig.page(IoOp::kWrite, 0);
    request.offset = 1;
    CHECK_EQ(rig.result_of(request), -std::int64_t{EINVAL});
  }
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  const rlimit tight{8 * kPage, before.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &tight);
  // An engine that takes its limits when it is made must be made under them.
  Rig limited(make_engine(name, 4));
  const std::int64_t beyond = limited.result_of(limited.page(IoOp::kWrite, 9));
  ::setrlimit(RLIMIT_FSIZE, &before);
  CHECK_EQ(beyond, -std::int64_t{EFBIG});
}

void goes_down_with_requests_in_flight(const std::string& name) {
  for (int round = 0; round < 10; ++round) {
    Rig rig(make_engine(name, 16));
    for (unsigned i = 0; i < 16; ++i) rig.engine->stage(rig.page(IoOp::kWrite, i));
    if (round % 2 == 0) rig.engine->submit();
    rig.engine.reset();
  }
  CHECK(true);  // no hang, no crash, no report of a sanitizer
}

void registered_and_other_memory_mix() {
  Rig rig(make_uring_engine(8));
  const int code = rig.engine->register_memory(rig.memory.data() + 4 * kPage, 8 * kPage);
  if (code != 0) std::printf("registration refused: %s\n", std::strerror(code));
  // Wholly before, across its begin, inside, across its end, wholly behind.
  for (const std::uint64_t first : {0u, 3u, 5u, 11u, 20u}) {
    Request request = rig.page(IoOp::kWrite, first);
    request.nbytes = 2 * kPage;
    CHECK_EQ(rig.result_of(request), std::int64_t(2 * kPage));
    HostMapping back(2 * kPage);
    request.op = IoOp::kRead;
    request.address = back.data();
    CHECK_EQ(rig.result_of(request), std::int64_t(2 * kPage));
    CHECK(std::memcmp(back.data(), rig.memory.data() + first * kPage, 2 * kPage) == 0);
  }
}

// The kernel registers at most 1 GiB in one piece; a request may lie across two of them.
void a_request_crosses_two_registered_pieces() {
  constexpr std::size_t kPiece = std::size_t{1} << 30;
  Rig rig(make_uring_engine(4));
  HostMapping large(kPiece + 4 * kPage);
  const int code = rig.engine->register_memory(large.data(), large.nbytes());
  if (code != 0) {
    std::printf("registration refused: %s\n", std::strerror(code));
    CHECK(code == ENOMEM || code == EPERM);
    return;
  }
  for (const std::size_t at : {kPiece - 2 * kPage, kPiece - kPage, kPiece}) {
    std::memset(large.data() + at, 1 + int(at / kPage % 7), 2 * kPage);
    const Request request{IoOp::kWrite, rig.file.fd(), large.data() + at, 2 * kPage, 0, 1};
    CHECK_EQ(rig.result_of(request), std::int64_t(2 * kPage));
    Request back{IoOp::kRead, rig.file.fd(), rig.memory.data(), 2 * kPage, 0, 2};
    CHECK_EQ(rig.result_of(back), std::int64_t(2 * kPage));
    CHECK(std::memcmp(rig.memory.data(), large.data() + at, 2 * kPage) == 0);
  }
}

void rules_meet_the_requests_they_name(const std::string& inner) {
  FaultPlan plan;
  plan.rules.push_back({IoOp::kWrite, 1, 2, FaultRule::Action::kError, ENOSPC, 0, 0});
  plan.rules.push_back({IoOp::kRead, 0, 1, FaultRule::Action::kShort, 0, 700, 0});
  plan.rules.push_back({std::nullopt, 5, 1, FaultRule::Action::kError, EIO, 0, 0});
  Rig rig(make_fault_engine(make_engine(inner, 2), plan));
  CHECK_EQ(rig.engine->name(), "fault:" + inner);
  CHECK_EQ(rig.result_of(rig.page(IoOp::kWrite, 0)), std::int64_t(kPage));
  // A request refused for want of room has not been seen by any rule.
  CHECK(rig.engine->stage(rig.page(IoOp::kRead, 0)));
  CHECK(rig.engine->stage(rig.page(IoOp::kRead, 1)));
  CHECK(!rig.engine->stage(rig.page(IoOp::kRead, 2)));
  const auto reads = rig.collect(2);
  CHECK_EQ(reads[0].result, 700);
  CHECK_EQ(reads[1].result, std::int64_t(kPage));
  CHECK_EQ(rig.result_of(rig.page(IoOp::kWrite, 1)), -std::int64_t{ENOSPC});
  CHECK_EQ(rig.result_of(rig.page(IoOp::kWrite, 2)), -std::int64_t{ENOSPC});
  CHECK_EQ(rig.result_of(rig.page(IoOp::kWrite, 3)), -std::int64_t{EIO});
  CHECK_EQ(rig.result_of(rig.page(IoOp::kWrite, 4)), std::int64_t(kPage));
}

void a_short_write_leaves_the_rest_unwritten(const std::string& inner) {
  FaultPlan plan;
  plan.rules.push_back({IoOp::kWrite, 0, 1, FaultRule::Action::kShort, 0, kPage + 5, 0});
  plan.rules.push_back({IoOp::kWrite, 1, 1, FaultRule::Action::kShort, 0, 0, 0});
  Rig rig(make_fault_engine(make_engine(inner, 4), plan));
  Request request = rig.page(IoOp::kWrite, 0);
  request.nbytes = 4 * kPage;
  CHECK_EQ(rig.result_of(request), std::int64_t(kPage + 5));
  CHECK_EQ(rig.result_of(request), 0);
  HostMapping back(4 * kPage);
  request.op = IoOp::kRead;
  request.address = back.data();
  CHECK_EQ(rig.result_of(request), std::int64_t(4 * kPage));
  CHECK(std::memcmp(back.data(), rig.memory.data(), kPage + 5) == 0);
  CHECK(back.data()[2 * kPage] == std::byte{0} && back.data()[4 * kPage - 1] == std::byte{0});
}

void a_corrupt_request_differs_in_one_byte_of_the_drive_only(const std::string& inner) {
  for (const IoOp op : {IoOp::kWrite, IoOp::kRead}) {
    FaultPlan plan;
    plan.rules.push_back({op, 0, 1, FaultRule::Action::kCorrupt, 0, 100, 0});
    Rig rig(make_fault_engine(make_engine(inner, 4), plan));
    CHECK_EQ(rig.result_of(rig.page(IoOp::kWrite, 2)), std::int64_t(kPage));
    CHECK(rig.memory.data()[2 * kPage + 100] == std::byte{3});
    CHECK_EQ(rig.result_of(rig.page(IoOp::kRead, 2)), std::int64_t(kPage));
    for (std::size_t i = 0; i < kPage; ++i) {
      CHECK(rig.memory.data()[2 * kPage + i] == std::byte(i == 100 ? 2 : 3));
    }
  }
}

void delayed_and_throttled_requests_wait_their_turn(const std::string& inner) {
  FaultPlan delayed;
  delayed.rules.push_back({IoOp::kWrite, 0, 1, FaultRule::Action::kDelay, 0, 0, 3600});
  Rig rig(make_fault_engine(make_engine(inner, 4), delayed));
  CHECK(rig.engine->stage(rig.page(IoOp::kWrite, 0)));
  CHECK(rig.engine->stage(rig.page(IoOp::kWrite, 1)));
  CHECK_EQ(rig.collect(1)[0].tag, 1u);
  std::vector<Completion> none;
  for (int i = 0; i < 5; ++i) rig.engine->wait(none, microseconds(100));
  CHECK(none.empty());

  FaultPlan slow;
  slow.bytes_per_s = 1;
  Rig throttled(make_fault_engine(make_engine(inner, 4), slow));
  CHECK(throttled.engine->stage(throttled.page(IoOp::kWrite, 0)));
  throttled.engine->submit();
  for (int i = 0; i < 5; ++i) throttled.engine->wait(none, microseconds(100));
  CHECK(none.empty());
}

void discarded_requests_succeed_and_move_nothing(const std::string& inner) {
  FaultPlan plan;
  plan.discard = true;
  Rig rig(make_fault_engine(make_engine(inner, 4), plan));
  CHECK_EQ(rig.result_of(rig.page(IoOp::kWrite, 0)), std::int64_t(kPage));
  HostMapping back(kPage);
  CHECK_EQ(::pread(rig.file.fd(), back.data(), kPage, 0), ssize_t(kPage));
  CHECK(back.data()[0] == std::byte{0});
  CHECK_EQ(rig.result_of(rig.page(IoOp::kRead, 0)), std::int64_t(kPage));
  CHECK(rig.memory.data()[0] == std::byte{1});
}

}  // namespace

int main() {
  std::vector<std::string> inner = {"posix"};
  try {
    make_uring_engine(1);
    inner.push_back("uring");
    registered_and_other_memory_mix();
    a_request_crosses_two_registered_pieces();
  } catch (const IoError& error) {
    std::printf("no io_uring here: %s\n", error.what());
  }
  for (const std::string& name : inner) {
    for (const std::string& engine : {name, "fault:" + name}) {
      takes_as_many_as_its_depth_and_then_refuses(engine);
      a_wake_before_or_while_waiting_ends_the_wait(engine);
      a_wait_with_a_limit_comes_back_empty(engine);
      reports_what_the_kernel_says(engine);
      goes_down_with_requests_in_flight(engine);
    }
    rules_meet_the_requests_they_name(name);
    a_short_write_leaves_the_rest_unwritten(name);
    a_corrupt_request_differs_in_one_byte_of_the_drive_only(name);
    delayed_and_throttled_requests_wait_their_turn(name);
    discarded_requests_succeed_and_move_nothing(name);
  }
  return check::status();
}
