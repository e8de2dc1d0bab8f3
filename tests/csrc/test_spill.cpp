// Spill and Extent while the drive is well: every size comes back bit for bit at the same address
// modulo 64, through staging of any size, and everything taken is given back.
#include <cstring>
#include <random>
#include <thread>

#include "align.h"
#include "check.h"
#include "spill.h"
#include "spill_state.h"

using namespace offload;

namespace {

constexpr std::uint64_t kBlock = 16'384;

// Page-aligned, so that sizes say how many pages they take.
struct Bytes {
  HostMapping mapping;
  std::size_t length;

  Bytes(std::size_t nbytes, unsigned seed) : mapping(nbytes), length(nbytes) {
    std::mt19937 random(seed);
    for (std::size_t i = 0; i < nbytes; ++i) mapping.data()[i] = static_cast<std::byte>(random());
  }
  const std::byte* data() const { return mapping.data(); }
  std::size_t size() const { return length; }
};

struct Rig {
  check::Directory directory;
  std::string engine;
  std::shared_ptr<Arena> arena;
  std::shared_ptr<Spill> spill;

  explicit Rig(const std::string& engine_name, std::size_t arena_bytes = 64 * kBlock,
               SpillOptions options = {})
      : engine(engine_name), arena(Arena::create(arena_bytes)), spill(open(options)) {}
  // A spill of its own, on the same arena.
  std::shared_ptr<Spill> open(SpillOptions options = {}) const {
    options.directory = directory.path;
    options.engine = engine;
    options.queue_depth = 4;
    options.block_bytes = kBlock;
    if (options.spill_bytes == 0) options.spill_bytes = 64 << 20;
    return Spill::open(options, arena);
  }
  // Until nothing is on its way: the queue lets go of a transfer just after its end is told.
  void settle() { spill->drain(); }
};

bool holds(const Restored& restored, const std::byte* source, std::uint64_t nbytes) {
  return restored.nbytes == nbytes && std::memcmp(restored.address, source, nbytes) == 0 &&
         reinterpret_cast<std::uintptr_t>(restored.address) % kTensorAlign ==
             reinterpret_cast<std::uintptr_t>(source) % kTensorAlign;
}

void every_size_and_residue_comes_back(const std::string& engine) {
  for (const bool verify : {true, false}) {
    SpillOptions options;
    options.verify = verify;
    Rig rig(engine, 64 * kBlock, options);
    const Bytes bytes(6 * kBlock, 1);
    for (const std::uint64_t nbytes :
         {1u, 511u, 512u, 4095u, 4096u, 4097u, 16'383u, 16'384u, 16'385u, 50'000u, 81'920u}) {
      for (const std::size_t lead : {0u, 1u, 8u, 63u, 64u}) {
        const auto extent = rig.spill->write(bytes.data() + lead, nbytes);
        CHECK(holds(extent->fetch(), bytes.data() + lead, nbytes));  // most likely forwarded
        extent->wait_written();
        CHECK(holds(extent->fetch(), bytes.data() + lead, nbytes));
        CHECK(holds(extent->fetch(), bytes.data() + lead, nbytes));
        CHECK(extent->prefetch());
        CHECK(holds(extent->fetch(), bytes.data() + lead, nbytes));
      }
    }
    rig.settle();
    CHECK_EQ(rig.spill->stats().used_bytes, 0u);
    CHECK_EQ(rig.arena->stats().used, 0u);
    CHECK_EQ(rig.arena->stats().outside, 0u);
  }
}

void a_tensor_larger_than_staging_goes_through_in_pieces(const std::string& engine) {
  // Staging of one page (less than a block), one block, one piece, and a bit more.
  for (const std::size_t arena_bytes : {std::uint64_t{4096}, kBlock, 4 * kBlock, 9 * kBlock}) {
    Rig rig(engine, arena_bytes);
    const Bytes bytes(20 * kBlock + 999, 2);
    const auto extent = rig.spill->write(bytes.data() + 3, 20 * kBlock + 700);
    CHECK(holds(extent->fetch(), bytes.data() + 3, 20 * kBlock + 700));
    extent->wait_written();
    CHECK(!extent->prefetch());  // no room for it in the arena
    CHECK(!extent->ready());
    const Restored restored = extent->fetch();
    CHECK(restored.slice->outside() && !restored.forwarded);
    CHECK(holds(restored, bytes.data() + 3, 20 * kBlock + 700));
  }
}

void writing_does_not_wait_for_memory_that_restored_tensors_hold(const std::string& engine) {
  Rig rig(engine, 8 * kBlock);
  const Bytes bytes(8 * kBlock, 3);
  const auto first = rig.spill->write(bytes.data(), 8 * kBlock);
  first->wait_written();
  const Restored held = first->fetch();
  CHECK(!held.slice->outside());
  const auto second = rig.spill->write(bytes.data(), 7 * kBlock);
  CHECK(holds(second->fetch(), bytes.data(), 7 * kBlock));
  CHECK(holds(held, bytes.data(), 8 * kBlock));
}

void staging_waits_for_writes_to_another_directory_too(const std::string& engine) {
  const Rig rig(engine, 8 * kBlock);
  SpillOptions options;
  options.faults = FaultPlan{};
  options.faults->bytes_per_s = 40e6;
  const auto& fast = rig.spill;
  const auto slow = rig.open(options);
  const Bytes bytes(8 * kBlock, 3);
  std::vector<std::shared_ptr<Extent>> extents;
  for (int i = 0; i < 10; ++i) {
    extents.push_back(slow->write(bytes.data(), 8 * kBlock));  // all of the arena
    extents.push_back(fast->write(bytes.data(), kBlock));
  }
  // Less than a block, which alone in a queue need not start by itself.
  for (int i = 0; i < 10; ++i) {
    extents.push_back(fast->write(bytes.data(), kBlock / 2));
    extents.push_back(slow->write(bytes.data(), 7 * kBlock + kBlock / 2 + 1));
  }
  CHECK_EQ(rig.arena->stats().native_peak, rig.arena->capacity());  // nothing went outside of it
  for (const auto& extent : extents) {
    extent->wait_written();
    CHECK(holds(extent->fetch(), bytes.data(), extent->nbytes()));
  }
}

void one_of_two_on_an_arena_closes_and_the_other_goes_on(const std::string& engine) {
  const Rig rig(engine, 8 * kBlock);
  const auto& first = rig.spill;
  const auto second = rig.open();
  const Bytes bytes(8 * kBlock, 6);
  const auto extent = second->write(bytes.data(), 8 * kBlock);
  extent->wait_written();
  second->drain();
  std::thread closer([&] { first->close(); });
  first->close();  // returns when all is done, whoever did it
  closer.join();
  CHECK_THROWS(first->write(bytes.data(), 1), std::runtime_error);
  CHECK(holds(extent->fetch(), bytes.data(), bytes.size()));
  const auto again = second->write(bytes.data(), 4 * kBlock);
  again->wait_written();
  CHECK(holds(again->fetch(), bytes.data(), 4 * kBlock));
}

void an_answer_in_use_is_given_again(const std::string& engine) {
  Rig rig(engine);
  const Bytes bytes(kBlock, 4);
  const auto extent = rig.spill->write(bytes.data(), kBlock);
  extent->wait_written();
  auto first = extent->fetch();
  CHECK(!first.forwarded);
  const auto again = extent->fetch();
  CHECK(again.forwarded && again.address == first.address);
  CHECK_EQ(rig.spill->stats().reloaded_bytes, kBlock);
  CHECK_EQ(rig.spill->stats().forwarded_bytes, kBlock);
}

void withdrawn_writes_leave_the_queue_working(const std::string& engine) {
  SpillOptions options;
  options.faults = FaultPlan{};
  options.faults->bytes_per_s = 40e6;
  Rig rig(engine, 64 * kBlock, options);
  const Bytes bytes(kBlock, 5);
  for (int round = 0; round < 5; ++round) {
    std::vector<std::shared_ptr<Extent>> dropped;
    for (int i = 0; i < 32; ++i) dropped.push_back(rig.spill->write(bytes.data(), kBlock));
    dropped.clear();
    const auto kept = rig.spill->write(bytes.data(), kBlock);
    kept->wait_written();
    CHECK(holds(kept->fetch(), bytes.data(), kBlock));
  }
  rig.settle();
  CHECK(rig.spill->stats().queue.write_bytes < 5 * 33 * kBlock);
  CHECK_EQ(rig.arena->stats().used, 0u);
  CHECK_EQ(rig.spill->stats().used_bytes, 0u);
}

void full_spill_space_is_told_and_comes_back(const std::string& engine) {
  SpillOptions options;
  options.spill_bytes = 3 * kBlock;
  Rig rig(engine, 64 * kBlock, options);
  const Bytes bytes(4 * kBlock, 4);
  CHECK(rig.spill->write(bytes.data(), 3 * kBlock + 1) == nullptr);
  auto first = rig.spill->write(bytes.data(), 2 * kBlock);
  CHECK(first != nullptr);
  CHECK(rig.spill->write(bytes.data(), 2 * kBlock) == nullptr);
  const auto second = rig.spill->write(bytes.data(), kBlock);
  CHECK(second != nullptr);
  CHECK_EQ(rig.spill->stats().used_bytes, 3 * kBlock);
  CHECK_EQ(rig.spill->stats().reserved_bytes, 3 * kBlock);
  first.reset();
  rig.settle();
  CHECK(rig.spill->write(bytes.data(), 2 * kBlock) != nullptr);
  CHECK(holds(second->fetch(), bytes.data(), kBlock));
}

void a_buffer_outlives_extent_spill_and_arena(const std::string& engine) {
  const Bytes bytes(3 * kBlock, 5);
  for (const bool forwarded : {true, false}) {
    Restored restored;
    {
      Rig rig(engine);
      const auto extent = rig.spill->write(bytes.data(), bytes.size());
      if (!forwarded) extent->wait_written();
      restored = extent->fetch();
    }
    CHECK(holds(restored, bytes.data(), bytes.size()));
  }
}

void extents_dropped_in_flight_leave_nothing(const std::string& engine) {
  Rig rig(engine, 64 * kBlock);
  const Bytes bytes(5 * kBlock, 6);
  std::mt19937 random(7);
  for (int i = 0; i < 400; ++i) {
    auto extent = rig.spill->write(bytes.data(), 1 + random() % bytes.size());
    const unsigned dice = random() % 4;
    if (dice == 1) extent->wait_written();
    if (dice >= 1) extent->prefetch();
    if (dice == 3) extent->fetch();
    extent.reset();
  }
  rig.settle();
  CHECK_EQ(rig.spill->stats().used_bytes, 0u);
  CHECK_EQ(rig.arena->stats().used, 0u);
  CHECK_EQ(rig.arena->stats().outside, 0u);
}

void a_spill_dropped_in_flight_joins_its_transfers(const std::string& engine) {
  const Bytes bytes(4 * kBlock, 8);
  for (int round = 0; round < 30; ++round) {
    auto rig = std::make_unique<Rig>(engine);
    const auto arena = rig->arena;
    std::vector<std::shared_ptr<Extent>> extents;
    for (int i = 0; i < 12; ++i) extents.push_back(rig->spill->write(bytes.data(), bytes.size()));
    if (round % 3 == 0) extents.clear();
    rig.reset();
    if (round % 3 == 1) CHECK(holds(extents[11]->fetch(), bytes.data(), bytes.size()));
    extents.clear();  // the last of them takes the Spill with it
    CHECK_EQ(arena->stats().used, 0u);
  }
}

void closing_keeps_what_is_in_memory_and_refuses_the_rest(const std::string& engine) {
  Rig rig(engine, 256 * kBlock);
  const Bytes bytes(8 * kBlock, 9);
  const auto early = rig.spill->write(bytes.data(), bytes.size());
  early->wait_written();
  std::vector<std::shared_ptr<Extent>> extents;
  for (int i = 0; i < 20; ++i) extents.push_back(rig.spill->write(bytes.data(), bytes.size()));
  rig.spill->close();
  rig.spill->close();
  rig.spill->drain();
  CHECK_THROWS(rig.spill->write(bytes.data(), 1), std::runtime_error);
  CHECK_THROWS(early->fetch(), std::runtime_error);
  for (const auto& extent : extents) {
    extent->wait_written();
    if (extent->ready()) CHECK(holds(extent->fetch(), bytes.data(), bytes.size()));
  }
  extents.clear();
  CHECK_EQ(rig.arena->stats().used, 0u);
}

void threads_write_and_fetch_at_once(const std::string& engine) {
  Rig rig(engine, 24 * kBlock);  // too little for all of them
  const Bytes bytes(12 * kBlock, 10);
  std::vector<std::thread> threads;
  for (unsigned id = 0; id < 4; ++id) {
    threads.emplace_back([&, id] {
      std::mt19937 random(id);
      std::vector<std::pair<std::shared_ptr<Extent>, std::uint64_t>> mine;
      for (int step = 0; step < 120; ++step) {
        const std::uint64_t nbytes = 1 + random() % bytes.size();
        mine.emplace_back(rig.spill->write(bytes.data() + bytes.size() - nbytes, nbytes), nbytes);
        if (mine.size() < 4) continue;
        std::swap(mine[random() % 4], mine.back());
        const auto [extent, length] = mine.back();
        mine.pop_back();
        mine.front().first->prefetch();
        CHECK(holds(extent->fetch(), bytes.data() + bytes.size() - length, length));
      }
    });
  }
  for (auto& thread : threads) thread.join();
  rig.settle();
  CHECK_EQ(rig.spill->stats().used_bytes, 0u);
  CHECK_EQ(rig.arena->stats().used, 0u);
  CHECK_EQ(rig.arena->stats().outside, 0u);
}

void spills_with_no_limit_set_leave_half_of_the_drive_together() {
  const std::uint64_t drive = 1000 * kPageBytes;
  std::uint64_t free = drive;
  std::vector<std::uint64_t> reserved(3, 0);
  for (int round = 0; round < 100; ++round) {
    for (auto& mine : reserved) {
      const std::uint64_t grown = std::min(room_to_grow(drive / 2, mine, free), 7 * kPageBytes);
      mine += grown;
      free -= grown;
    }
  }
  CHECK_EQ(free, drive / 2);
  // One whose limit was set keeps to it and to nothing else.
  CHECK_EQ(room_to_grow(10 * kPageBytes, 4 * kPageBytes, std::nullopt), 6 * kPageBytes);
  CHECK_EQ(room_to_grow(4 * kPageBytes, 10 * kPageBytes, std::nullopt), 0u);
}

void wrong_settings_are_refused() {
  const check::Directory directory;
  const auto arena = Arena::create(kBlock);
  const auto open = [&](auto change) {
    SpillOptions options;
    options.directory = directory.path;
    change(options);
    return Spill::open(options, arena);
  };
  CHECK_THROWS(open([](auto& o) { o.block_bytes = 0; }), std::invalid_argument);
  CHECK_THROWS(open([](auto& o) { o.block_bytes = 4097; }), std::invalid_argument);
  CHECK_THROWS(open([](auto& o) { o.block_bytes = std::uint64_t{4} << 30; }),
               std::invalid_argument);
  CHECK_THROWS(open([](auto& o) { o.queue_depth = 0; }), std::invalid_argument);
  CHECK_THROWS(open([](auto& o) { o.engine = "fast"; }), std::invalid_argument);
  CHECK_THROWS(open([](auto& o) { o.directory += "/missing"; }), IoError);
  CHECK_THROWS(open([](auto&) {})->write(nullptr, 0), std::invalid_argument);
}

}  // namespace

int main() {
  for (const std::string engine : {"auto", "posix"}) {
    every_size_and_residue_comes_back(engine);
    a_tensor_larger_than_staging_goes_through_in_pieces(engine);
    writing_does_not_wait_for_memory_that_restored_tensors_hold(engine);
    staging_waits_for_writes_to_another_directory_too(engine);
    one_of_two_on_an_arena_closes_and_the_other_goes_on(engine);
    an_answer_in_use_is_given_again(engine);
    withdrawn_writes_leave_the_queue_working(engine);
    full_spill_space_is_told_and_comes_back(engine);
    a_buffer_outlives_extent_spill_and_arena(engine);
    extents_dropped_in_flight_leave_nothing(engine);
    a_spill_dropped_in_flight_joins_its_transfers(engine);
    closing_keeps_what_is_in_memory_and_refuses_the_rest(engine);
    threads_write_and_fetch_at_once(engine);
  }
  spills_with_no_limit_set_leave_half_of_the_drive_together();
  wrong_settings_are_refused();
  return check::status();
}
