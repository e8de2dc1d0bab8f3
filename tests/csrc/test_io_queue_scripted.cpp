// IoQueue over a scripted engine: every way a transfer can come back, and every way an engine can
// break, with nothing left to chance.
#include <atomic>
#include <numeric>
#include <thread>

#include "check.h"
#include "crc32c.h"
#include "io_queue.h"
#include "scripted_engine.h"

using namespace offload;

// A broken engine's memory is leaked on purpose: the kernel may still write to it.
extern "C" const char* __lsan_default_suppressions() { return "leak:fail_everything"; }

namespace {

constexpr std::uint64_t kBlock = 4096;
constexpr std::uint32_t kAlignment = 512;

struct Rig {
  std::shared_ptr<Drive> drive = std::make_shared<Drive>(64 * kBlock);
  std::unique_ptr<IoQueue> queue;
  std::vector<std::byte> memory = std::vector<std::byte>(64 * kBlock);
  std::atomic<int> ends{0};

  explicit Rig(Script script, unsigned depth = 4) {
    for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = std::byte(i * 7 + i / 251);
    queue = std::make_unique<IoQueue>(std::make_unique<ScriptedEngine>(drive, std::move(script)),
                                      IoQueue::Options{-1, "drive", kBlock, kAlignment, depth});
  }
  std::shared_ptr<Transfer> start(IoOp op, std::uint64_t offset, std::uint64_t nbytes) {
    TransferRequest request{op, memory.data() + offset, nbytes, offset, nullptr, nullptr, nullptr};
    request.owner = std::make_shared<int>(1);
    request.on_end = [this](const auto&, bool) { ++ends; };
    return queue->submit(std::move(request));
  }
  std::shared_ptr<Transfer> write(std::uint64_t offset, std::uint64_t nbytes) {
    return start(IoOp::kWrite, offset, nbytes);
  }
  bool written(std::uint64_t offset, std::uint64_t nbytes) {
    return std::memcmp(drive->bytes.data() + offset, memory.data() + offset, nbytes) == 0;
  }
  IoError error_of(const Transfer& transfer) {
    try {
      queue->wait(transfer);
    } catch (const IoError& error) {
      return error;
    }
    return IoError(0, "no error", "");
  }
};

bool names(const IoError& error, const std::string& part) {
  return std::string(error.what()).find(part) != std::string::npos;
}

void a_short_transfer_is_resumed_wherever_it_stopped() {
  for (const IoOp op : {IoOp::kWrite, IoOp::kRead}) {
    for (std::uint64_t victim = 0; victim < 4; ++victim) {
      for (const std::int64_t moved : {0, 1, 511, 512, 513, 1024, 4095}) {
        Script script;
        script.result = [=](const Request& request, std::uint64_t index) {
          return index == victim ? moved : static_cast<std::int64_t>(request.nbytes);
        };
        Rig rig(script);
        const auto before = rig.memory;
        if (op == IoOp::kRead) {
          std::copy(before.begin(), before.end(), rig.drive->bytes.begin());
          std::fill(rig.memory.begin(), rig.memory.end(), std::byte{0});
        }
        rig.queue->wait(*rig.start(op, kBlock, 3 * kBlock + 100));
        CHECK(rig.written(kBlock, 3 * kBlock + 100));
        CHECK(std::equal(before.begin() + kBlock, before.begin() + 4 * kBlock + 100,
                         rig.memory.begin() + kBlock));
        // The last block has 100 bytes, all of which 511 and more are.
        CHECK_EQ(rig.queue->stats().resumed, victim == 3 && moved >= 100 ? 0u : 1u);
        for (const Request& request : rig.drive->requests()) {
          CHECK_EQ(request.offset % kAlignment, 0u);
        }
      }
    }
  }
}

void a_transfer_in_crumbs_still_arrives() {
  Script script;
  script.result = [](const Request&, std::uint64_t) { return 600; };
  script.newest_first = true;
  Rig rig(script, 3);
  rig.queue->wait(*rig.write(0, 10 * kBlock));
  CHECK(rig.written(0, 10 * kBlock));
  CHECK_EQ(rig.queue->stats().requests, 80u);
  CHECK_EQ(rig.queue->stats().write_bytes, 10 * kBlock);
}

void passing_errors_are_tried_again() {
  for (const int code : {EAGAIN, EINTR}) {
    Script script;
    script.result = [=](const Request& request, std::uint64_t index) {
      return index < 20 ? -std::int64_t{code} : static_cast<std::int64_t>(request.nbytes);
    };
    Rig rig(script, 1);
    rig.queue->wait(*rig.write(0, 2 * kBlock));
    CHECK(rig.written(0, 2 * kBlock));
  }
}

void no_progress_for_ever_is_an_error() {
  for (const std::int64_t result :
       {-std::int64_t{EAGAIN}, -std::int64_t{EINTR}, std::int64_t{0}, std::int64_t{511}}) {
    Script script;
    script.result = [=](const Request& request, std::uint64_t) {
      return request.offset == kBlock ? result : static_cast<std::int64_t>(request.nbytes);
    };
    Rig rig(script);
    const auto stuck = rig.write(0, 3 * kBlock);
    const auto fine = rig.write(8 * kBlock, kBlock);
    const IoError error = rig.error_of(*stuck);
    CHECK_EQ(error.code(), EIO);
    CHECK(names(error, "offset 4096") && names(error, "without progress"));
    rig.queue->wait(*fine);
    CHECK_EQ(rig.ends.load(), 2);
  }
}

void a_failed_block_fails_its_transfer_and_no_other() {
  for (const int code : {EIO, ENOSPC, EDQUOT}) {
    for (std::uint64_t bad = 0; bad < 12; ++bad) {
      Script script;
      script.result = [=](const Request& request, std::uint64_t) {
        return request.offset == bad * kBlock ? -std::int64_t{code}
                                              : static_cast<std::int64_t>(request.nbytes);
      };
      Rig rig(script);
      const auto victim = rig.write(0, 12 * kBlock);
      const auto other = rig.write(20 * kBlock, 5 * kBlock);
      const IoError error = rig.error_of(*victim);
      CHECK_EQ(error.code(), code);
      CHECK_EQ(error.path(), std::string("drive"));
      CHECK(names(error, "write of 4096 bytes at offset " + std::to_string(bad * kBlock)));
      rig.queue->wait(*other);
      CHECK(rig.written(20 * kBlock, 5 * kBlock));
      rig.queue->drain();
      CHECK_EQ(rig.ends.load(), 2);
      // At most a queue's depth more was handed out after the failure.
      CHECK(rig.drive->requests().size() <= bad + 1 + 4 + 5);
    }
  }
}

void the_first_of_several_errors_is_told() {
  Script script;
  script.one_at_a_time = true;
  script.result = [](const Request& request, std::uint64_t) {
    return request.offset == 0 ? -std::int64_t{ENOSPC} : -std::int64_t{EIO};
  };
  Rig rig(script);
  CHECK_EQ(rig.error_of(*rig.write(0, 6 * kBlock)).code(), ENOSPC);
  rig.queue->drain();
  CHECK_EQ(rig.ends.load(), 1);
}

void a_changed_byte_is_found_in_its_block() {
  for (std::uint64_t at = 0; at < 3 * kBlock; at += 1365) {
    Rig rig({});
    std::vector<std::uint32_t> sums;
    for (int i = 0; i < 3; ++i) sums.push_back(crc32c(0, rig.memory.data() + i * kBlock, kBlock));
    rig.queue->wait(*rig.write(0, 3 * kBlock));
    rig.drive->bytes[at] ^= std::byte{0x10};
    TransferRequest request{IoOp::kRead, rig.memory.data(), 3 * kBlock, 0,
                            sums.data(), nullptr,           nullptr};
    const auto transfer = rig.queue->submit(std::move(request));
    const IoError error = rig.error_of(*transfer);
    CHECK_EQ(error.code(), EBADMSG);
    CHECK(names(error, "offset " + std::to_string(at / kBlock * kBlock) + " "));
    CHECK(names(error, "extent at 0, 12288 bytes"));
  }
}

void comparing_checksums_leaves_the_drive_full() {
  Rig rig(Script{});  // completes all that is in flight at once
  std::vector<std::uint32_t> sums;
  for (int i = 0; i < 32; ++i) sums.push_back(crc32c(0, rig.memory.data() + i * kBlock, kBlock));
  std::copy(rig.memory.begin(), rig.memory.end(), rig.drive->bytes.begin());
  TransferRequest request{IoOp::kRead, rig.memory.data(), 32 * kBlock, 0,
                          sums.data(), nullptr,           nullptr};
  rig.queue->wait(*rig.queue->submit(std::move(request)));
  rig.queue->close();
  const auto& in_flight = rig.drive->in_flight;
  CHECK(in_flight.size() >= 8);
  const auto first = std::find(in_flight.begin(), in_flight.end(), 4u);
  for (auto at = first; at != first + 8; ++at) CHECK_EQ(*at, 4u);
}

void reads_go_before_writes_and_both_in_order() {
  Script script;
  script.depth = 1;
  Rig rig(script, 1);
  rig.drive->set_gate(false);
  rig.write(0, kBlock);
  rig.drive->wait_for_staged(1);
  rig.write(kBlock, kBlock);
  rig.start(IoOp::kRead, 2 * kBlock, kBlock);
  rig.write(3 * kBlock, kBlock);
  rig.start(IoOp::kRead, 4 * kBlock, kBlock);
  rig.drive->set_gate(true);
  rig.queue->drain();
  std::vector<std::uint64_t> order;
  for (const Request& request : rig.drive->requests()) order.push_back(request.offset / kBlock);
  CHECK(order == (std::vector<std::uint64_t>{0, 2, 4, 1, 3}));
}

void an_engine_that_refuses_now_and_then_only_takes_longer() {
  for (const unsigned engine_depth : {1u, 3u, 8u}) {
    Script script;
    script.depth = engine_depth;
    script.refuses = [](std::uint64_t attempt, std::size_t in_flight) {
      return in_flight != 0 && attempt % 3 == 2;
    };
    Rig rig(script, 6);
    for (std::uint64_t i = 0; i < 8; ++i) rig.write(i * 5 * kBlock, 5 * kBlock - i);
    rig.queue->drain();
    for (std::uint64_t i = 0; i < 8; ++i) CHECK(rig.written(i * 5 * kBlock, 5 * kBlock - i));
    CHECK_EQ(rig.ends.load(), 8);
  }
}

void an_engine_that_always_refuses_is_an_error_and_no_hang() {
  Script script;
  script.refuses = [](std::uint64_t attempt, std::size_t) { return attempt >= 2; };
  Rig rig(script);
  const auto transfer = rig.write(0, 5 * kBlock);
  CHECK_EQ(rig.error_of(*transfer).code(), EIO);
  CHECK_THROWS(rig.write(0, kBlock), IoError);
  CHECK_EQ(rig.ends.load(), 1);
  rig.queue->close();
}

void a_broken_engine_fails_everything_once_and_for_all() {
  for (const bool in_wait : {false, true}) {
    for (std::uint64_t at = 1; at < 12; ++at) {
      Script script;
      (in_wait ? script.wait_throws_at : script.submit_throws_at) = at;
      Rig rig(script);
      std::vector<std::shared_ptr<Transfer>> transfers;
      int accepted = 0;
      for (std::uint64_t i = 0; i < 6; ++i) {
        try {
          transfers.push_back(rig.write(i * 4 * kBlock, 3 * kBlock));
          ++accepted;
        } catch (const IoError& error) {
          CHECK(names(error, "scripted breakdown"));
        }
      }
      int failed = 0;
      for (const auto& transfer : transfers) failed += rig.error_of(*transfer).code() == EIO;
      CHECK(failed > 0);
      rig.queue->drain();
      CHECK_EQ(rig.ends.load(), accepted);
      CHECK_THROWS(rig.write(0, kBlock), IoError);
      CHECK(transfers.empty() || !rig.queue->try_cancel(*transfers.front()));
      rig.queue->close();
    }
  }
}

}  // namespace

int main() {
  a_short_transfer_is_resumed_wherever_it_stopped();
  a_transfer_in_crumbs_still_arrives();
  passing_errors_are_tried_again();
  no_progress_for_ever_is_an_error();
  a_failed_block_fails_its_transfer_and_no_other();
  the_first_of_several_errors_is_told();
  a_changed_byte_is_found_in_its_block();
  comparing_checksums_leaves_the_drive_full();
  reads_go_before_writes_and_both_in_order();
  an_engine_that_refuses_now_and_then_only_takes_longer();
  an_engine_that_always_refuses_is_an_error_and_no_hang();
  a_broken_engine_fails_everything_once_and_for_all();
  return check::status();
}
