// ExtentAllocator against a map of single units that can neither fragment nor forget.
#include <random>
#include <vector>

#include "check.h"
#include "extent_allocator.h"

using offload::ExtentAllocator;

namespace {

void hands_out_the_lowest_range_that_fits() {
  ExtentAllocator space(100);
  CHECK_EQ(*space.allocate(10), 0u);
  CHECK_EQ(*space.allocate(20), 10u);
  CHECK_EQ(*space.allocate(30), 30u);
  space.release(0, 10);
  CHECK_EQ(*space.allocate(11), 60u);  // the hole of 10 is too short
  CHECK_EQ(*space.allocate(10), 0u);
  CHECK(!space.allocate(30));
  CHECK_EQ(*space.allocate(29), 71u);
  CHECK_EQ(space.used(), 100u);
  CHECK_EQ(space.free_ranges(), 0u);
}

void joins_a_returned_range_with_both_neighbours() {
  ExtentAllocator space(30);
  for (int i = 0; i < 3; ++i) space.allocate(10);
  space.release(0, 10);
  space.release(20, 10);
  CHECK_EQ(space.free_ranges(), 2u);
  space.release(10, 10);
  CHECK_EQ(space.free_ranges(), 1u);
  CHECK_EQ(*space.allocate(30), 0u);
}

void growth_continues_the_last_free_range() {
  ExtentAllocator space(0);
  CHECK(!space.allocate(1));
  space.grow(10);
  CHECK_EQ(*space.allocate(6), 0u);
  space.grow(0);
  space.grow(10);
  CHECK_EQ(space.free_ranges(), 1u);
  CHECK_EQ(*space.allocate(14), 6u);
  CHECK_EQ(space.capacity(), 20u);
  space.grow(5);  // behind a range in use
  CHECK_EQ(*space.allocate(5), 20u);
}

void peaks_stay_when_the_bytes_go_back() {
  ExtentAllocator space(100);
  space.allocate(40);
  space.release(0, 40);
  space.allocate(10);
  CHECK_EQ(space.used(), 10u);
  CHECK_EQ(space.peak_used(), 40u);
  CHECK_EQ(space.high_water(), 40u);
}

void misuse_is_refused_and_changes_nothing() {
  ExtentAllocator space(100);
  CHECK_THROWS(space.allocate(0), std::invalid_argument);
  space.allocate(50);
  CHECK_THROWS(space.release(60, 10), std::logic_error);  // never handed out
  CHECK_THROWS(space.release(40, 20), std::logic_error);  // half of it never handed out
  CHECK_THROWS(space.release(0, 60), std::logic_error);   // more than is in use
  CHECK_THROWS(space.release(90, 20), std::logic_error);  // beyond the end
  space.release(0, 20);
  CHECK_THROWS(space.release(0, 20), std::logic_error);  // twice
  CHECK_THROWS(space.release(10, 20), std::logic_error);
  CHECK_EQ(space.used(), 30u);
  space.release(20, 30);
  CHECK_EQ(*space.allocate(100), 0u);
}

class Model {
 public:
  explicit Model(std::uint64_t capacity) : taken_(capacity, false) {}

  std::int64_t lowest_fit(std::uint64_t nbytes) const {
    std::uint64_t run = 0;
    for (std::uint64_t at = 0; at < taken_.size(); ++at) {
      run = taken_[at] ? 0 : run + 1;
      if (run == nbytes) return static_cast<std::int64_t>(at + 1 - nbytes);
    }
    return -1;
  }
  void mark(std::uint64_t offset, std::uint64_t nbytes, bool taken) {
    for (std::uint64_t i = 0; i < nbytes; ++i) taken_[offset + i] = taken;
  }
  void grow(std::uint64_t nbytes) { taken_.resize(taken_.size() + nbytes, false); }
  std::size_t free_ranges() const {
    std::size_t ranges = 0;
    for (std::size_t at = 0; at < taken_.size(); ++at) {
      ranges += !taken_[at] && (at == 0 || taken_[at - 1]);
    }
    return ranges;
  }

 private:
  std::vector<bool> taken_;
};

void agrees_with_the_model(unsigned seed) {
  std::mt19937 random(seed);
  ExtentAllocator space(64);
  Model model(64);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> live;
  for (int step = 0; step < 4000; ++step) {
    const unsigned dice = random() % 100;
    if (dice < 55) {
      const std::uint64_t nbytes = 1 + random() % 12;
      const auto got = space.allocate(nbytes);
      CHECK_EQ(got ? static_cast<std::int64_t>(*got) : -1, model.lowest_fit(nbytes));
      if (!got) continue;
      model.mark(*got, nbytes, true);
      live.emplace_back(*got, nbytes);
    } else if (dice < 99 || space.capacity() > 400) {
      if (live.empty()) continue;
      std::swap(live[random() % live.size()], live.back());
      space.release(live.back().first, live.back().second);
      model.mark(live.back().first, live.back().second, false);
      live.pop_back();
    } else {
      const std::uint64_t nbytes = random() % 20;
      space.grow(nbytes);
      model.grow(nbytes);
    }
    CHECK_EQ(space.free_ranges(), model.free_ranges());
  }
  for (const auto& [offset, nbytes] : live) space.release(offset, nbytes);
  CHECK_EQ(space.used(), 0u);
  CHECK_EQ(space.free_ranges(), 1u);
}

}  // namespace

int main() {
  hands_out_the_lowest_range_that_fits();
  joins_a_returned_range_with_both_neighbours();
  growth_continues_the_last_free_range();
  peaks_stay_when_the_bytes_go_back();
  misuse_is_refused_and_changes_nothing();
  for (unsigned seed = 1; seed <= 8; ++seed) agrees_with_the_model(seed);
  return check::status();
}
