// Spill and Extent while the drive is not well. Either the right bytes come back or an IoError
// says which did not; whatever was taken is given back; nothing waits for ever.
#include <cstring>
#include <random>

#include "align.h"
#include "check.h"
#include "spill.h"

using namespace offload;
using Action = FaultRule::Action;

namespace {

constexpr std::uint64_t kBlock = 8192;

struct Rig {
  check::Directory directory;
  std::shared_ptr<Arena> arena;
  std::shared_ptr<Spill> spill;
  HostMapping bytes{40 * kBlock};

  Rig(const std::string& engine, std::size_t arena_bytes, FaultPlan plan, bool verify = true) {
    arena = Arena::create(arena_bytes);
    SpillOptions options;
    options.directory = directory.path;
    options.engine = engine;
    options.queue_depth = 3;
    options.block_bytes = kBlock;
    options.spill_bytes = 16 << 20;
    options.verify = verify;
    options.faults = std::move(plan);
    spill = Spill::open(options, arena);
    std::mt19937 random(1);
    for (std::size_t i = 0; i < bytes.nbytes(); ++i) bytes.data()[i] = std::byte(random());
  }
  std::shared_ptr<Extent> write(std::uint64_t nbytes) { return spill->write(bytes.data(), nbytes); }
  bool holds(const Restored& restored) {
    return std::memcmp(restored.address, bytes.data(), restored.nbytes) == 0;
  }
  void check_nothing_is_held() {
    spill->drain();
    const SpillStats stats = spill->stats();
    CHECK_EQ(stats.used_bytes, 0u);
    CHECK_EQ(stats.kept_bytes, 0u);
    CHECK_EQ(arena->stats().used, 0u);
    CHECK_EQ(arena->stats().outside, 0u);
  }
};

FaultPlan rule(std::optional<IoOp> op, std::uint64_t first, std::uint64_t count, Action action,
               int code, std::uint64_t nbytes) {
  return {{{op, first, count, action, code, nbytes, 0}}, 0, false};
}

int code_of(const auto& action) {
  try {
    action();
  } catch (const IoError& error) {
    return error.code();
  }
  return 0;
}

// A tensor of 12 blocks goes through staging whole (64 blocks) or in three pieces (5 blocks).
constexpr std::size_t kWhole = 64 * kBlock;
constexpr std::size_t kPieces = 5 * kBlock;

void a_drive_full_at_any_block_keeps_the_bytes(const std::string& engine) {
  for (const std::size_t arena_bytes : {kWhole, kPieces}) {
    for (const int code : {ENOSPC, EDQUOT, EFBIG}) {
      for (std::uint64_t at = 0; at < 12; ++at) {
        Rig rig(engine, arena_bytes, rule(IoOp::kWrite, at, 1, Action::kError, code, 0));
        auto extent = rig.write(12 * kBlock);
        extent->wait_written();
        rig.spill->drain();
        CHECK(rig.spill->stats().kept_bytes > 0);
        extent->prefetch();
        CHECK(rig.holds(extent->fetch()));
        CHECK(rig.holds(extent->fetch()));
        CHECK(!rig.spill->write_error());
        CHECK_EQ(rig.arena->stats().used, 0u);  // kept outside of staging
        extent.reset();
        rig.check_nothing_is_held();
      }
    }
  }
}

void a_drive_full_for_ever_keeps_everything(const std::string& engine) {
  Rig rig(engine, kPieces, rule(IoOp::kWrite, 4, 1 << 20, Action::kError, ENOSPC, 0));
  std::vector<std::shared_ptr<Extent>> extents;
  for (int i = 0; i < 12; ++i) extents.push_back(rig.write(11 * kBlock - 77));
  for (const auto& extent : extents) CHECK(rig.holds(extent->fetch()));
  extents.clear();
  rig.check_nothing_is_held();
}

void a_failed_write_is_told_and_never_read_back(const std::string& engine) {
  for (const bool verify : {true, false}) {
    for (const std::size_t arena_bytes : {kWhole, kPieces}) {
      for (std::uint64_t at = 0; at < 12; ++at) {
        Rig rig(engine, arena_bytes, rule(IoOp::kWrite, at, 1, Action::kError, EIO, 0), verify);
        auto extent = rig.write(12 * kBlock);
        CHECK_EQ(code_of([&] { extent->wait_written(); }), EIO);
        rig.spill->drain();
        CHECK_EQ(rig.spill->write_error() ? rig.spill->write_error()->code() : 0, EIO);
        // Even where its bytes are still in staging: the drive has begun to lose tensors.
        CHECK_EQ(code_of([&] { rig.write(kBlock); }), EIO);
        extent->prefetch();
        CHECK_EQ(code_of([&] { extent->fetch(); }), EIO);
        // Whoever has kept the bytes may go on, with others.
        rig.spill->forget_write_error();
        CHECK(!rig.spill->write_error());
        auto next = rig.write(kBlock);
        next->wait_written();
        CHECK_EQ(code_of([&] { extent->wait_written(); }), EIO);
        next.reset();
        extent.reset();
        rig.check_nothing_is_held();
      }
    }
  }
}

void a_failed_write_is_not_read_ahead_as_if_it_had_worked(const std::string& engine) {
  // Room comes back after the write in pieces, so that prefetch() could read the whole extent.
  Rig rig(engine, 13 * kBlock, rule(IoOp::kWrite, 2, 1, Action::kError, EIO, 0), false);
  auto hog = rig.arena->try_allocate(8 * kBlock);
  auto extent = rig.write(8 * kBlock);
  CHECK_EQ(code_of([&] { extent->wait_written(); }), EIO);
  rig.spill->drain();
  hog.reset();
  CHECK(!extent->prefetch());
  CHECK_EQ(code_of([&] { extent->fetch(); }), EIO);
}

void a_failed_read_is_told_and_the_next_one_works(const std::string& engine) {
  for (const bool ahead : {true, false}) {
    for (std::uint64_t at = 0; at < 12; ++at) {
      Rig rig(engine, kWhole, rule(IoOp::kRead, at, 1, Action::kError, EIO, 0));
      auto extent = rig.write(12 * kBlock);
      extent->wait_written();
      if (ahead) CHECK(extent->prefetch());
      CHECK_EQ(code_of([&] { extent->fetch(); }), EIO);
      CHECK(rig.holds(extent->fetch()));
      extent.reset();
      rig.check_nothing_is_held();
    }
  }
}

void a_failed_read_between_kept_pieces_gives_its_memory_back(const std::string& engine) {
  FaultPlan plan = rule(IoOp::kWrite, 0, 1, Action::kError, ENOSPC, 0);
  plan.rules.push_back({IoOp::kRead, 5, 1, Action::kError, EIO, 0, 0});
  Rig rig(engine, kPieces, plan);
  auto extent = rig.write(12 * kBlock);
  extent->wait_written();
  CHECK_EQ(code_of([&] { extent->fetch(); }), EIO);
  CHECK(rig.holds(extent->fetch()));
  extent.reset();
  rig.check_nothing_is_held();
}

void a_changed_byte_is_an_error_and_never_data(const std::string& engine) {
  for (const IoOp op : {IoOp::kWrite, IoOp::kRead}) {
    for (const std::size_t arena_bytes : {kWhole, kPieces}) {
      for (std::uint64_t at = 0; at < 12; ++at) {
        Rig rig(engine, arena_bytes, rule(op, at, 1, Action::kCorrupt, 0, at * 700));
        auto extent = rig.write(12 * kBlock);
        extent->wait_written();
        rig.spill->drain();
        CHECK_EQ(code_of([&] { extent->fetch(); }), EBADMSG);
        // On the drive it stays wrong; on the way it was wrong once.
        if (op == IoOp::kWrite) {
          CHECK_EQ(code_of([&] { extent->fetch(); }), EBADMSG);
        } else {
          CHECK(rig.holds(extent->fetch()));
        }
        extent.reset();
        rig.check_nothing_is_held();
      }
    }
  }
}

void forwarding_never_shows_what_a_bad_drive_was_given(const std::string& engine) {
  Rig rig(engine, kWhole, rule(IoOp::kWrite, 0, 1 << 20, Action::kCorrupt, 0, 5));
  for (int i = 0; i < 50; ++i) {
    const auto extent = rig.write(3 * kBlock);
    Restored restored;
    const int code = code_of([&] { restored = extent->fetch(); });
    CHECK(code == EBADMSG || (restored.forwarded && rig.holds(restored)));
  }
}

void short_transfers_are_completed(const std::string& engine) {
  for (const std::uint64_t nbytes : {0u, 1u, 511u, 512u, 4095u, 4096u, 4097u, 8191u}) {
    Rig rig(engine, kPieces, rule(std::nullopt, 0, 31, Action::kShort, 0, nbytes));
    const auto extent = rig.write(12 * kBlock - 5);
    extent->wait_written();
    CHECK(rig.holds(extent->fetch()));
    CHECK(rig.spill->stats().queue.resumed >= 12);
  }
}

void random_misfortune_is_an_error_or_the_right_bytes(const std::string& engine) {
  std::mt19937 random(11);
  for (int round = 0; round < 60; ++round) {
    FaultPlan plan;
    for (int i = 0; i < 12; ++i) {
      const std::optional<IoOp> ops[] = {std::nullopt, IoOp::kRead, IoOp::kWrite};
      const int codes[] = {EIO, ENOSPC, EAGAIN, EINTR, EDQUOT};
      plan.rules.push_back({ops[random() % 3], random() % 80, 1 + random() % 3,
                            static_cast<Action>(random() % 4), codes[random() % 5], random() % 9000,
                            1e-4 * (random() % 4)});
    }
    Rig rig(engine, (3 + random() % 40) * kBlock, plan);
    std::vector<std::shared_ptr<Extent>> extents;
    for (int i = 0; i < 12; ++i) {
      try {
        extents.push_back(rig.write(1 + random() % (20 * kBlock)));
      } catch (const IoError& error) {
        CHECK_EQ(error.code(), EIO);  // of an earlier one
        break;
      }
      auto& chosen = extents[random() % extents.size()];
      if (random() % 2) chosen->prefetch();
      try {
        if (random() % 2) CHECK(rig.holds(chosen->fetch()));
      } catch (const IoError& error) {
        CHECK(error.code() == EIO || error.code() == EBADMSG || is_no_space(error.code()));
      }
    }
    if (round % 3 == 0) rig.spill->close();
    extents.clear();
    rig.check_nothing_is_held();
  }
}

}  // namespace

int main() {
  for (const std::string engine : {"auto", "posix"}) {
    a_drive_full_at_any_block_keeps_the_bytes(engine);
    a_drive_full_for_ever_keeps_everything(engine);
    a_failed_write_is_told_and_never_read_back(engine);
    a_failed_write_is_not_read_ahead_as_if_it_had_worked(engine);
    a_failed_read_is_told_and_the_next_one_works(engine);
    a_failed_read_between_kept_pieces_gives_its_memory_back(engine);
    a_changed_byte_is_an_error_and_never_data(engine);
    forwarding_never_shows_what_a_bad_drive_was_given(engine);
    short_transfers_are_completed(engine);
    random_misfortune_is_an_error_or_the_right_bytes(engine);
  }
  return check::status();
}
