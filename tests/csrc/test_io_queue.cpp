// IoQueue over the real engines, and its life: several threads, cancelling, draining, closing.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <thread>

#include "arena.h"
#include "check.h"
#include "file.h"
#include "io_queue.h"
#include "scripted_engine.h"

using namespace offload;

namespace {

constexpr std::uint64_t kBlock = 8192;

std::unique_ptr<IoEngine> make_engine(const std::string& name, unsigned depth) {
  if (name == "posix") return make_posix_engine(depth, 3);
  if (name == "uring") return make_uring_engine(depth);
  FaultPlan plan;
  // Shorts and passing errors all the time: a queue that works notices nothing.
  for (std::uint64_t at = 0; at < 300; at += 5) {
    plan.rules.push_back({std::nullopt, at, 1, FaultRule::Action::kShort, 0, at * 37, 0});
    plan.rules.push_back({std::nullopt, at + 2, 1, FaultRule::Action::kError, EAGAIN, 0, 0});
  }
  return make_fault_engine(make_engine(name.substr(6), depth), plan);
}

std::vector<std::string> engines() {
  std::vector<std::string> names = {"posix", "fault:posix"};
  try {
    make_uring_engine(1);
    names.insert(names.end(), {"uring", "fault:uring"});
  } catch (const IoError& error) {
    std::printf("no io_uring here: %s\n", error.what());
  }
  return names;
}

struct Rig {
  check::Directory directory;
  SpillFile file;
  IoQueue queue;
  HostMapping memory{256 * kBlock};

  Rig(const std::string& engine, unsigned depth, bool direct)
      : file(directory.path, direct),
        queue(make_engine(engine, depth),
              {file.fd(), file.path(), kBlock, file.alignment(), depth}) {
    file.reserve(0, memory.nbytes());
    std::mt19937 random(1);
    for (std::size_t i = 0; i < memory.nbytes(); ++i) memory.data()[i] = std::byte(random());
  }
  std::shared_ptr<Transfer> start(IoOp op, std::byte* address, std::uint64_t nbytes,
                                  std::uint64_t offset) {
    return queue.submit({op, address, nbytes, offset, nullptr, nullptr, nullptr});
  }
};

void every_length_comes_back(const std::string& engine) {
  for (const unsigned depth : {1u, 7u}) {
    Rig rig(engine, depth, false);
    std::vector<std::byte> back(4 * kBlock);
    for (const std::uint64_t nbytes :
         {0u, 1u, 511u, 512u, 513u, 4095u, 4096u, 4097u, 8191u, 8192u, 8193u, 24'576u, 30'001u}) {
      rig.queue.wait(*rig.start(IoOp::kWrite, rig.memory.data(), nbytes, 512));
      std::fill(back.begin(), back.end(), std::byte{0});
      rig.queue.wait(*rig.start(IoOp::kRead, back.data(), nbytes, 512));
      CHECK(std::memcmp(back.data(), rig.memory.data(), nbytes) == 0);
      CHECK(back[nbytes] == std::byte{0});
    }
  }
}

void direct_pages_come_back(const std::string& engine) {
  Rig rig(engine, 4, true);
  HostMapping back(32 * kBlock);
  for (std::uint64_t pages = 1; pages <= 64; pages *= 2) {
    rig.queue.wait(*rig.start(IoOp::kWrite, rig.memory.data(), pages * 4096, 4096));
    rig.queue.wait(*rig.start(IoOp::kRead, back.data(), pages * 4096, 4096));
    CHECK(std::memcmp(back.data(), rig.memory.data(), pages * 4096) == 0);
  }
}

void reading_past_the_end_is_an_error_and_no_hang(const std::string& engine) {
  Rig rig(engine, 4, true);
  const auto beyond = rig.start(IoOp::kRead, rig.memory.data(), kBlock, rig.memory.nbytes());
  CHECK_THROWS(rig.queue.wait(*beyond), IoError);
}

void threads_share_the_queue(const std::string& engine) {
  Rig rig(engine, 8, true);
  HostMapping back(rig.memory.nbytes());
  std::vector<std::thread> threads;
  for (unsigned id = 0; id < 4; ++id) {
    threads.emplace_back([&, id] {
      std::mt19937 random(id);
      const std::uint64_t base = id * 64 * kBlock;
      for (int step = 0; step < 60; ++step) {
        const std::uint64_t begin = base + random() % 32 * kBlock;
        const std::uint64_t nbytes = (1 + random() % 32) * kBlock;
        rig.queue.wait(*rig.start(IoOp::kWrite, rig.memory.data() + begin, nbytes, begin));
        rig.queue.wait(*rig.start(IoOp::kRead, back.data() + begin, nbytes, begin));
        CHECK(std::memcmp(back.data() + begin, rig.memory.data() + begin, nbytes) == 0);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  rig.queue.drain();
  const QueueStats stats = rig.queue.stats();
  CHECK_EQ(stats.read_bytes, stats.write_bytes);
}

void closing_ends_every_transfer_exactly_once(const std::string& engine) {
  for (int round = 0; round < 20; ++round) {
    Rig rig(engine, 2, true);
    std::atomic<int> ends{0};
    std::vector<std::shared_ptr<Transfer>> transfers;
    std::thread closer;
    for (std::uint64_t i = 0; i < 60; ++i) {
      if (i == std::uint64_t(3 * round)) closer = std::thread([&] { rig.queue.close(); });
      try {
        transfers.push_back(
            rig.queue.submit({IoOp::kWrite, rig.memory.data(), 4 * kBlock, i * 4 * kBlock, nullptr,
                              nullptr, [&](const auto&, bool) { ++ends; }}));
      } catch (const std::runtime_error&) {
        break;  // closed already
      }
    }
    closer.join();
    rig.queue.close();
    rig.queue.drain();
    for (const auto& transfer : transfers) CHECK(transfer->ended());
    CHECK_EQ(std::size_t(ends), transfers.size());
    CHECK_THROWS(rig.start(IoOp::kRead, rig.memory.data(), 1, 0), std::runtime_error);
  }
}

void a_cancelled_transfer_never_began_and_a_begun_one_is_never_cancelled() {
  const auto drive = std::make_shared<Drive>(400 * 512);
  std::vector<std::byte> memory(400 * 512, std::byte{1});
  IoQueue queue(std::make_unique<ScriptedEngine>(drive, Script{}), {-1, "drive", 512, 512, 4});
  std::vector<std::shared_ptr<Transfer>> transfers;
  std::vector<char> cancelled(200);
  for (std::uint64_t i = 0; i < 200; ++i) {
    transfers.push_back(
        queue.submit({IoOp::kWrite, memory.data() + i * 1024, 1024, i * 1024, nullptr, nullptr,
                      [&cancelled, i](const auto&, bool yes) { cancelled[i] += yes ? 1 : 2; }}));
    // Sometimes the newest, sometimes one that most likely runs.
    if (i % 3 == 0) queue.try_cancel(*transfers[i]);
    if (i % 3 == 1) queue.try_cancel(*transfers[i / 2]);
  }
  queue.drain();
  for (std::uint64_t i = 0; i < 200; ++i) {
    const bool stopped = transfers[i]->state() == Transfer::State::kCancelled;
    CHECK_EQ(int(cancelled[i]), stopped ? 1 : 2);
    CHECK(drive->bytes[i * 1024] == std::byte(stopped ? 0 : 1));
    CHECK(drive->bytes[i * 1024 + 1023] == std::byte(stopped ? 0 : 1));
    CHECK(!queue.try_cancel(*transfers[i]));
    if (stopped) CHECK_THROWS(queue.wait(*transfers[i]), IoError);
  }
}

void lazy_writes_start_when_anybody_asks() {
  const auto drive = std::make_shared<Drive>(64 * 512);
  std::vector<std::byte> memory(64 * 512, std::byte{1});
  IoQueue queue(std::make_unique<ScriptedEngine>(drive, Script{}), {-1, "drive", 4096, 512, 4});
  const auto lazy = [&](std::uint64_t at) {
    return queue.submit({IoOp::kWrite, memory.data() + at, 512, at, nullptr, nullptr, nullptr},
                        /*lazy=*/true);
  };
  for (int round = 0; round < 100; ++round) {
    queue.wait(*lazy(0));
    lazy(512);
    queue.drain();
    CHECK(drive->bytes[512] == std::byte{1});
    const auto flushed = lazy(1024);
    queue.flush();
    while (!flushed->ended()) std::this_thread::yield();
    // A block's worth starts by itself.
    std::vector<std::shared_ptr<Transfer>> together;
    for (std::uint64_t i = 0; i < 8; ++i) together.push_back(lazy(i * 512));
    for (const auto& transfer : together) {
      while (!transfer->ended()) std::this_thread::yield();
    }
    const auto before_read = lazy(0);
    queue.wait(*queue.submit({IoOp::kRead, memory.data(), 512, 512, nullptr, nullptr, nullptr}));
    while (!before_read->ended()) std::this_thread::yield();
  }
}

void owners_live_until_the_last_block_is_back() {
  const auto drive = std::make_shared<Drive>(8 * 512);
  std::vector<std::byte> memory(8 * 512);
  IoQueue queue(std::make_unique<ScriptedEngine>(drive, Script{}), {-1, "drive", 512, 512, 2});
  auto owner = std::make_shared<int>(1);
  const std::weak_ptr<int> alive = owner;
  drive->set_gate(false);
  const auto transfer =
      queue.submit({IoOp::kWrite, memory.data(), 8 * 512, 0, nullptr, std::move(owner), nullptr});
  drive->wait_for_staged(2);
  CHECK(!alive.expired());
  CHECK(!queue.try_cancel(*transfer));
  drive->set_gate(true);
  queue.wait(*transfer);
  CHECK(alive.expired());
}

void destruction_waits_for_what_has_begun() {
  const auto drive = std::make_shared<Drive>(8 * 512);
  std::vector<std::byte> memory(8 * 512, std::byte{1});
  std::shared_ptr<Transfer> begun, queued;
  std::thread opener;
  {
    IoQueue queue(std::make_unique<ScriptedEngine>(drive, Script{}), {-1, "drive", 512, 512, 2});
    drive->set_gate(false);
    begun = queue.submit({IoOp::kWrite, memory.data(), 7 * 512, 0, nullptr, nullptr, nullptr});
    drive->wait_for_staged(2);
    queued = queue.submit({IoOp::kWrite, memory.data(), 512, 7 * 512, nullptr, nullptr, nullptr});
    opener = std::thread([&] {
      while (!queued->ended()) std::this_thread::yield();
      drive->set_gate(true);
    });
  }
  opener.join();
  CHECK(begun->state() == Transfer::State::kDone);
  CHECK(queued->state() == Transfer::State::kCancelled);
  CHECK(drive->bytes[7 * 512 - 1] == std::byte{1});
  CHECK(drive->bytes[7 * 512] == std::byte{0});
}

}  // namespace

int main() {
  for (const std::string& engine : engines()) {
    every_length_comes_back(engine);
    direct_pages_come_back(engine);
    reading_past_the_end_is_an_error_and_no_hang(engine);
    threads_share_the_queue(engine);
    closing_ends_every_transfer_exactly_once(engine);
  }
  a_cancelled_transfer_never_began_and_a_begun_one_is_never_cancelled();
  lazy_writes_start_when_anybody_asks();
  owners_live_until_the_last_block_is_back();
  destruction_waits_for_what_has_begun();
  return check::status();
}
