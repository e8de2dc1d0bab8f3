// Extents that a device fills: their bytes come later than their space, from another thread, or
// are wanted back before they were ever written.
#include <cstring>
#include <random>
#include <thread>

#include "align.h"
#include "check.h"
#include "spill.h"

using namespace offload;

namespace {

constexpr std::uint64_t kBlock = 8192;

struct Rig {
  check::Directory directory;
  std::shared_ptr<Arena> arena;
  std::shared_ptr<Spill> spill;
  HostMapping bytes{16 * kBlock};

  explicit Rig(const std::string& engine, std::size_t arena_bytes = 64 * kBlock,
               FaultPlan plan = {}) {
    arena = Arena::create(arena_bytes);
    SpillOptions options;
    options.directory = directory.path;
    options.engine = engine;
    options.queue_depth = 3;
    options.block_bytes = kBlock;
    options.spill_bytes = 32 * kBlock;
    options.faults = std::move(plan);
    spill = Spill::open(options, arena);
    std::mt19937 random(2);
    for (std::size_t i = 0; i < bytes.nbytes(); ++i) bytes.data()[i] = std::byte(random());
  }
  // What a device's copy engine does.
  void fill(const Restored& staged) const {
    std::memcpy(staged.address, bytes.data(), staged.nbytes);
  }
  bool holds(const Restored& restored, std::uint64_t nbytes, std::uint64_t lead) const {
    return restored.nbytes == nbytes &&
           reinterpret_cast<std::uintptr_t>(restored.address) % kTensorAlign == lead &&
           std::memcmp(restored.address, bytes.data(), nbytes) == 0;
  }
  void check_nothing_is_held() const {
    spill->drain();
    CHECK_EQ(spill->stats().used_bytes, 0u);
    CHECK_EQ(arena->stats().used, 0u);
    CHECK_EQ(arena->stats().outside, 0u);
    CHECK(!arena->writing());
  }
};

void what_a_device_put_there_comes_back_from_the_drive(const std::string& engine) {
  Rig rig(engine);
  for (const std::uint64_t nbytes : {1u, 4096u, 8191u, 8192u, 8193u, 70'001u}) {
    for (const std::uint64_t lead : {0u, 1u, 16u, 63u}) {
      const auto extent = rig.spill->stage(nbytes, lead);
      rig.fill(extent->staged());
      extent->start_write();
      extent->start_write();  // once is enough
      rig.spill->drain();
      extent->wait_written();
      const Restored restored = extent->fetch();
      CHECK(!restored.forwarded);
      CHECK(rig.holds(restored, nbytes, lead));
    }
  }
  rig.check_nothing_is_held();
}

// A new version is made where the old one was read to, and goes elsewhere: until then both are
// there.
void what_was_fetched_can_be_changed_and_written_again(const std::string& engine) {
  Rig rig(engine);
  for (const std::uint64_t lead : {0u, 16u}) {
    const std::uint64_t nbytes = 70'001;
    const auto before = rig.spill->stage(nbytes, lead);
    rig.fill(before->staged());
    before->start_write();
    rig.spill->drain();
    std::shared_ptr<Extent> after;
    {
      const Restored here = before->fetch();
      CHECK(!here.forwarded);
      after = rig.spill->restage(here);
      CHECK(after->offset() != before->offset());
      CHECK(after->staged().address == here.address);
      for (std::uint64_t i = 0; i < nbytes; ++i) here.address[i] ^= std::byte{0x5A};
      after->start_write();
      rig.spill->drain();
    }
    CHECK_EQ(rig.arena->stats().used, 0u);
    CHECK(rig.holds(before->fetch(), nbytes, lead));
    const Restored changed = after->fetch();
    CHECK(!changed.forwarded);
    for (std::uint64_t i = 0; i < nbytes; ++i) changed.address[i] ^= std::byte{0x5A};
    CHECK(rig.holds(changed, nbytes, lead));
  }
  rig.check_nothing_is_held();
}

void bytes_of_elsewhere_are_not_staged_again(const std::string& engine) {
  Rig rig(engine);
  {
    const auto extent = rig.spill->stage(kBlock, 0);
    rig.fill(extent->staged());
    Restored far = extent->staged();
    far.address += 64;
    CHECK_THROWS(rig.spill->restage(far), std::invalid_argument);
    Restored more = extent->staged();
    more.nbytes *= 2;
    CHECK_THROWS(rig.spill->restage(more), std::invalid_argument);
    extent->start_write();
  }
  rig.check_nothing_is_held();
}

void its_checksums_find_a_byte_that_changed(const std::string& engine) {
  FaultPlan plan{{{IoOp::kWrite, 1, 1, FaultRule::Action::kCorrupt, 0, 77, 0}}, 0, false};
  Rig rig(engine, 64 * kBlock, plan);
  const auto extent = rig.spill->stage(5 * kBlock, 8);
  rig.fill(extent->staged());
  extent->start_write();
  rig.spill->drain();
  extent->wait_written();
  int code = 0;
  try {
    extent->fetch();
  } catch (const IoError& error) {
    code = error.code();
  }
  CHECK_EQ(code, EBADMSG);
}

void wanted_before_it_was_written_it_never_is(const std::string& engine) {
  Rig rig(engine);
  {
    const auto extent = rig.spill->stage(3 * kBlock, 4);
    rig.fill(extent->staged());
    CHECK(extent->prefetch());
    CHECK(extent->ready());
    const Restored restored = extent->fetch();
    CHECK(restored.forwarded);
    CHECK(rig.holds(restored, 3 * kBlock, 4));
    extent->start_write();
    CHECK(rig.holds(extent->fetch(), 3 * kBlock, 4));
    bool refused = false;
    try {
      extent->staged();
    } catch (const std::logic_error&) {
      refused = true;
    }
    CHECK(refused);
  }
  rig.check_nothing_is_held();
  CHECK_EQ(rig.spill->stats().queue.write_bytes, 0u);
  CHECK_EQ(rig.spill->stats().cancelled_bytes, 3 * kBlock);
}

void dropped_before_it_was_written_it_gives_all_back(const std::string& engine) {
  Rig rig(engine);
  auto extent = rig.spill->stage(3 * kBlock, 0);
  const Restored staged = extent->staged();
  extent.reset();
  rig.fill(staged);  // the device is still at it
  CHECK_EQ(rig.spill->stats().used_bytes, 0u);
  CHECK(rig.arena->stats().used != 0);
}

void another_thread_begins_the_write_while_this_one_fetches(const std::string& engine) {
  Rig rig(engine);
  for (int round = 0; round < 200; ++round) {
    const auto extent = rig.spill->stage(2 * kBlock + 5, 12);
    rig.fill(extent->staged());
    std::thread starter([&] { extent->start_write(); });
    if (round % 3 == 0) extent->prefetch();
    CHECK(rig.holds(extent->fetch(), 2 * kBlock + 5, 12));
    starter.join();
    CHECK(rig.holds(extent->fetch(), 2 * kBlock + 5, 12));
  }
  rig.check_nothing_is_held();
}

void room_in_staging_is_waited_for(const std::string& engine) {
  Rig rig(engine, 4 * kBlock);
  const auto first = rig.spill->stage(3 * kBlock, 0);
  rig.fill(first->staged());
  std::thread starter([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    first->start_write();
  });
  const auto second = rig.spill->stage(3 * kBlock, 0);
  CHECK_EQ(rig.arena->stats().outside, 0u);
  starter.join();
  rig.fill(second->staged());
  second->start_write();
  CHECK(rig.holds(first->fetch(), 3 * kBlock, 0));
  CHECK(rig.holds(second->fetch(), 3 * kBlock, 0));
}

void what_finds_no_room_and_no_write_to_wait_for_is_told(const std::string& engine) {
  Rig rig(engine, 4 * kBlock);
  auto held = rig.spill->stage(3 * kBlock, 0);
  CHECK(held->prefetch());  // wanted back, so it is never written
  CHECK(rig.spill->stage(3 * kBlock, 0) == nullptr);
  CHECK_EQ(rig.arena->stats().outside, 0u);
  held.reset();
  CHECK(rig.spill->stage(3 * kBlock, 0) != nullptr);
  rig.check_nothing_is_held();
}

void a_full_spill_and_a_wrong_lead_are_told(const std::string& engine) {
  Rig rig(engine);
  CHECK(rig.spill->stage(40 * kBlock, 0) == nullptr);
  bool refused = false;
  try {
    rig.spill->stage(1, 64);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
  rig.check_nothing_is_held();
}

}  // namespace

int main() {
  for (const std::string engine : {"auto", "posix"}) {
    what_a_device_put_there_comes_back_from_the_drive(engine);
    what_was_fetched_can_be_changed_and_written_again(engine);
    bytes_of_elsewhere_are_not_staged_again(engine);
    its_checksums_find_a_byte_that_changed(engine);
    wanted_before_it_was_written_it_never_is(engine);
    dropped_before_it_was_written_it_gives_all_back(engine);
    another_thread_begins_the_write_while_this_one_fetches(engine);
    room_in_staging_is_waited_for(engine);
    what_finds_no_room_and_no_write_to_wait_for_is_told(engine);
    a_full_spill_and_a_wrong_lead_are_told(engine);
  }
  return check::status();
}
