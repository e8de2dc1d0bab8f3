// Arena: whole pages, a hard cap, and slices that find their way back from any thread.
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "align.h"
#include "arena.h"
#include "check.h"

using namespace offload;
using std::chrono::milliseconds;

namespace {

void slices_are_whole_pages_of_the_mapping() {
  const auto arena = Arena::create(100'000);
  CHECK_EQ(arena->capacity(), align_up(100'000, kPageBytes));
  for (const std::size_t nbytes : {1u, 511u, 512u, 4095u, 4096u, 4097u}) {
    const auto slice = arena->try_allocate(nbytes);
    CHECK(slice != nullptr);
    CHECK_EQ(reinterpret_cast<std::uintptr_t>(slice->data()) % kPageBytes, 0u);
    CHECK_EQ(slice->nbytes(), align_up(nbytes, kPageBytes));
    CHECK(!slice->outside());
    std::memset(slice->data(), 1, slice->nbytes());
  }
  CHECK_EQ(arena->stats().used, 0u);
  CHECK_EQ(arena->stats().peak_used, 2 * kPageBytes);
}

void the_cap_holds() {
  const auto arena = Arena::create(4 * kPageBytes);
  const auto whole = arena->try_allocate(4 * kPageBytes);
  CHECK(whole != nullptr);
  CHECK(arena->try_allocate(1) == nullptr);
  CHECK(Arena::create(kPageBytes)->try_allocate(kPageBytes + 1) == nullptr);
  CHECK_EQ(arena->stats().used, 4 * kPageBytes);
}

void a_limit_holds_what_is_in_use_but_lets_one_slice_through() {
  const auto arena = Arena::create(8 * kPageBytes);
  arena->set_limit(2 * kPageBytes);
  auto first = arena->try_allocate(2 * kPageBytes);
  CHECK(first != nullptr);
  CHECK(arena->try_allocate(1) == nullptr);
  arena->set_limit(3 * kPageBytes);
  const auto second = arena->try_allocate(1);
  CHECK(second != nullptr);
  arena->set_limit(0);  // what is in use stays
  CHECK(arena->try_allocate(1) == nullptr);
  first.reset();
  CHECK(arena->try_allocate(1) == nullptr);
  const auto other = Arena::create(8 * kPageBytes);
  other->set_limit(0);
  const auto large = other->try_allocate(5 * kPageBytes);
  CHECK(large != nullptr);
  CHECK(other->try_allocate(1) == nullptr);
  const auto outside = Arena::create(8 * kPageBytes);
  outside->set_limit(2 * kPageBytes);
  const auto beside = outside->allocate_outside(2 * kPageBytes);
  CHECK(outside->try_allocate(1) == nullptr);
}

void outside_slices_are_counted_while_they_live() {
  const auto arena = Arena::create(kPageBytes);
  const auto before = arena->stats();
  {
    const auto slice = arena->allocate_outside(3 * kPageBytes - 5);
    CHECK(slice->outside());
    CHECK_EQ(slice->nbytes(), 3 * kPageBytes);
    std::memset(slice->data(), 2, slice->nbytes());
    CHECK_EQ(arena->stats().outside, 3 * kPageBytes);
    CHECK_EQ(arena->stats().native, before.native + 3 * kPageBytes);
  }
  CHECK_EQ(arena->stats().outside, 0u);
  CHECK_EQ(arena->stats().native, before.native);
  CHECK_EQ(arena->stats().native_peak, before.native + 3 * kPageBytes);
}

void memory_counts_from_its_first_use_or_its_registration() {
  const auto arena = Arena::create(64 * kHugePageBytes);
  CHECK_EQ(arena->stats().native, 0u);
  arena->try_allocate(kHugePageBytes + 1);
  CHECK_EQ(arena->stats().native, 2 * kHugePageBytes);
  arena->mark_resident();
  CHECK_EQ(arena->stats().native, 64 * kHugePageBytes);
}

void a_slice_outlives_the_last_arena_pointer() {
  auto arena = Arena::create(kPageBytes);
  auto slice = arena->try_allocate(kPageBytes);
  arena.reset();
  std::memset(slice->data(), 3, slice->nbytes());
  CHECK(slice->data()[kPageBytes - 1] == std::byte{3});
  slice.reset();
}

void impossible_requests_are_refused() {
  const auto arena = Arena::create(kPageBytes);
  CHECK_THROWS(arena->try_allocate(0), std::invalid_argument);
  CHECK_THROWS(arena->allocate_outside(std::size_t{1} << 60), std::bad_alloc);
  CHECK_EQ(arena->stats().outside, 0u);
  CHECK(arena->try_allocate(kPageBytes) != nullptr);
}

void a_release_wakes_whoever_waits_for_it() {
  const auto arena = Arena::create(kPageBytes);
  auto slice = arena->try_allocate(kPageBytes);
  const std::uint64_t seen = arena->releases();
  std::thread dropper([&] { slice.reset(); });
  while (arena->releases() == seen) arena->wait_release(seen, milliseconds(10'000));
  dropper.join();
  CHECK(arena->try_allocate(kPageBytes) != nullptr);
  arena->wait_release(seen, milliseconds(10'000));  // long past: returns at once
  arena->wait_release(arena->releases(), milliseconds(1));
  CHECK_EQ(arena->stats().used, 0u);
}

void threads_never_share_a_page() {
  constexpr std::size_t kPages = 16;
  const auto arena = Arena::create(kPages * kPageBytes);
  std::vector<std::thread> threads;
  for (unsigned id = 1; id <= 4; ++id) {
    threads.emplace_back([&, id] {
      for (unsigned step = 0; step < 3000; ++step) {
        const std::size_t nbytes = (1 + (step * id) % 5) * kPageBytes;
        auto slice = arena->try_allocate(nbytes);
        if (slice == nullptr) slice = arena->allocate_outside(nbytes);
        std::memset(slice->data(), static_cast<int>(id), nbytes);
        bool mine = true;
        for (std::size_t at = 0; at < nbytes; at += 512) {
          mine &= slice->data()[at] == std::byte(id);
        }
        CHECK(mine);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK_EQ(arena->stats().used, 0u);
  CHECK_EQ(arena->stats().outside, 0u);
  CHECK(arena->stats().peak_used <= kPages * kPageBytes);
  CHECK(arena->try_allocate(kPages * kPageBytes) != nullptr);
}

}  // namespace

int main() {
  slices_are_whole_pages_of_the_mapping();
  the_cap_holds();
  a_limit_holds_what_is_in_use_but_lets_one_slice_through();
  outside_slices_are_counted_while_they_live();
  memory_counts_from_its_first_use_or_its_registration();
  a_slice_outlives_the_last_arena_pointer();
  impossible_requests_are_refused();
  a_release_wakes_whoever_waits_for_it();
  threads_never_share_a_page();
  return check::status();
}
