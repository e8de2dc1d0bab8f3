"""Tests of `offload.activations.schedule_book`: what is recorded, planned, and planned again."""

from __future__ import annotations

import math
import warnings

from offload.activations.recording import HostClock, Recording
from offload.activations.schedule_book import Plan, ScheduleBook

MIB = 1 << 20
REGIONS = 20


def book(**settings: object) -> ScheduleBook:
    chosen: dict[str, object] = {
        "staging_bytes": 1 << 40,
        "tier_bytes": {"ssd": math.inf},
        "memory_bytes": None,
        "write_bytes_per_s": math.inf,
        "follow": True,
    } | settings
    return ScheduleBook(**chosen)  # type: ignore[arg-type]


def recorded(regions: int = REGIONS) -> Recording:
    """A second forward, a region at a time, and two of backward in the reverse order."""
    recording = Recording(HostClock(lambda: 0.0))
    slot_s = 1 / regions
    recording.saved = [100 + slot_s * number for number in range(regions)]
    for number in range(regions):
        needed_s = 101 + 2 * slot_s * (regions - 1 - number)
        recording.needed[number] = needed_s
        recording.released[number] = needed_s + slot_s
    return recording


def learn(into: ScheduleBook, sizes: tuple[int, ...], depth: int = 1) -> None:
    into.learn(sizes, list(reversed(range(len(sizes)))), recorded(len(sizes)), depth)


def drive(rate: float, seconds: float = 1.0) -> tuple[tuple[float, float], tuple[float, float]]:
    return (rate * seconds, seconds), (rate * seconds, seconds)


def renewed(of: ScheduleBook, sizes: tuple[int, ...]) -> Plan:
    plan = of.plan_like(sizes)
    assert plan is not None
    return plan


def staying(of: ScheduleBook, sizes: tuple[int, ...]) -> int:
    return renewed(of, sizes).tiers.count("device")


SIZES = (4 * MIB,) * REGIONS
TOTAL = sum(SIZES)


def test_nothing_is_planned_before_the_drive_has_shown_what_it_does() -> None:
    it = book()
    learn(it, SIZES)
    assert it.plan_like(SIZES) is None
    it.observe(ssd=((4096, 1e-4), (0, 0)))
    assert it.plan_like(SIZES) is None, "a few kilobytes say nothing"
    it.observe(ssd=drive(TOTAL * 4))
    assert it.plan_like(SIZES) is not None
    assert it.planned == 1


def test_a_fast_drive_takes_nearly_all_and_a_slow_one_as_much_as_it_can() -> None:
    stays = []
    for rate in (0.1, 0.3, 1, 10):
        it = book()
        learn(it, SIZES)
        it.observe(ssd=drive(TOTAL * rate))
        stays.append(staying(it, SIZES))
    assert stays == sorted(stays, reverse=True)
    assert stays[0] > 0.8 * REGIONS
    assert 1 <= stays[-1] <= 2, "what the backward wants at once need not leave"


def test_a_drive_that_becomes_slow_makes_the_next_schedule_keep_more() -> None:
    it = book()
    learn(it, SIZES)
    it.observe(ssd=drive(TOTAL * 2))
    fast = staying(it, SIZES)
    written = TOTAL * 2.0
    for step in range(1, 6):
        written += TOTAL
        it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
        it.observe(ssd=((written, 1 + step * 5), (written, 1 + step * 5)))  # a tenth of what it was
    assert staying(it, SIZES) > fast + REGIONS // 4
    planned = it.planned
    for _ in range(100):
        it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
    it.observe(ssd=((written + TOTAL, 31), (written + TOTAL, 31)))
    it.plan_like(SIZES)
    assert it.planned == planned, "no news, no new plan"


def test_a_plan_is_followed_for_a_while_before_it_is_made_anew() -> None:
    it = book()
    learn(it, SIZES)
    it.observe(ssd=drive(TOTAL))
    it.plan_like(SIZES)
    seen = 1.0
    made = []
    for step in range(200):  # a drive that is never the same
        it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
        seconds = 3.0 if step % 2 else 0.3
        seen += seconds
        it.observe(ssd=((TOTAL * (step + 2), seen), (TOTAL * (step + 2), seen)))
        planned = it.planned
        it.plan_like(SIZES)
        if it.planned > planned:
            made.append(step)
    assert 1 <= len(made) <= 10


def test_a_second_step_confirms_the_first_and_knows_what_is_held() -> None:
    it = book()
    first = recorded()
    first.held.add(3)
    it.learn(SIZES, list(reversed(range(REGIONS))), first, 1)
    it.observe(ssd=drive(TOTAL * 10))
    for confirmed in (False, True, True):
        plan = renewed(it, SIZES)
        assert plan.confirmed == confirmed
        assert plan.tiers[3] == "device"
        learn(it, SIZES)
    assert it.planned == 2, "once confirmed, a recording changes nothing"


def test_a_drive_that_turns_out_to_read_slowly_is_planned_for_again() -> None:
    it = book()
    learn(it, SIZES)
    it.observe(ssd=((TOTAL * 4, 1), (0, 0)))  # all was handed over without reading
    before = staying(it, SIZES)
    for _ in range(2):
        it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
    it.observe(ssd=((TOTAL * 8, 2), (TOTAL * 0.5, 5)))
    assert staying(it, SIZES) > before


def test_forwards_under_way_together_share_the_drive() -> None:
    alone, two = book(), book()
    learn(alone, SIZES)
    learn(two, SIZES, depth=2)
    for it in (alone, two):
        it.observe(ssd=drive(TOTAL))
    assert staying(two, SIZES) > staying(alone, SIZES)


def test_several_kinds_of_forward_are_told_apart_by_their_first_sizes() -> None:
    it = book()
    kinds = [tuple(size * MIB for _ in range(5)) + (MIB,) * size for size in (1, 2, 3)]
    for sizes in kinds:
        learn(it, sizes)
    it.observe(ssd=drive(TOTAL))
    for sizes in kinds:
        for first in range(1, len(sizes) + 1):
            plan = it.plan_like(sizes[:first])
            assert plan is not None
            assert plan.sizes == sizes
    assert it.plan_like((7 * MIB,)) is None
    assert it.plan_like(kinds[0] + (MIB, MIB)) is None


def test_only_so_many_kinds_are_remembered() -> None:
    it = book()
    for size in range(1, 101):
        learn(it, (size * MIB,))
    assert it.order_of((MIB,)) is None
    assert it.order_of((100 * MIB,)) == [0]


def test_a_memory_limit_is_planned_for() -> None:
    it = book(memory_bytes=TOTAL // 2)
    learn(it, SIZES)
    it.observe(ssd=drive(TOTAL * 10))
    plan = renewed(it, SIZES)
    assert TOTAL // 4 < plan.schedule.peak_bytes <= TOTAL // 2


def test_a_limit_that_the_drive_is_too_slow_for_costs_time() -> None:
    limit = TOTAL // 4
    plans = []
    for settings in ({}, {"memory_bytes": limit}, {"tolerated_slowdown": 3.0}):
        it = book(**settings)
        learn(it, SIZES)
        it.observe(ssd=drive(TOTAL * 0.3))
        plans.append(renewed(it, SIZES).schedule)
    free, within, tolerated = plans
    assert free.slowdown == 0
    assert free.peak_bytes > limit >= within.peak_bytes
    assert 0.5 < within.slowdown < 20
    assert tolerated.slowdown == 3.0
    assert tolerated.peak_bytes < free.peak_bytes


def test_a_limit_that_nothing_meets_is_told_once_it_is_certain() -> None:
    it = book(memory_bytes=1)
    for time in (1, 2, 3):
        learn(it, SIZES)
        it.observe(ssd=drive(TOTAL * time))
        renewed(it, SIZES)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            it.say_what_is_wrong()
            it.say_what_is_wrong()
        assert len(told) == (time == 3), "until a step followed a plan of one not the first"
    assert "memory_bytes=1 cannot be met" in str(told[0].message)


def test_a_limit_that_the_drive_is_fast_enough_for_costs_none() -> None:
    it = book(memory_bytes=TOTAL // 2)
    learn(it, SIZES)
    it.observe(ssd=drive(TOTAL * 10))
    assert renewed(it, SIZES).schedule.slowdown == 0


def test_reads_are_due_in_the_order_of_need_and_none_too_late() -> None:
    it = book()
    learn(it, SIZES)
    it.observe(ssd=drive(TOTAL))
    plan = renewed(it, SIZES)
    assert plan.schedule.order == tuple(reversed(range(REGIONS)))
    assert list(plan.due) == sorted(plan.due)
    for place, number in enumerate(plan.schedule.order):
        if plan.tiers[number] != "device":
            assert plan.due[place] >= place


def test_a_region_held_by_others_stays() -> None:
    it = book()
    recording = recorded()
    recording.held.add(0)
    it.learn(SIZES, list(reversed(range(REGIONS))), recording, 1)
    it.observe(ssd=drive(TOTAL * 10))
    plan = renewed(it, SIZES)
    assert plan.tiers[0] == "device"
    assert plan.tiers[1] == "ssd"


def test_a_book_that_is_not_followed_remembers_orders_only() -> None:
    it = book(follow=False)
    learn(it, SIZES)
    it.observe(ssd=drive(TOTAL))
    assert it.plan_like(SIZES) is None
    assert it.order_of(SIZES) == list(reversed(range(REGIONS)))


def test_no_more_is_written_than_the_days_bytes_allow() -> None:
    it = book(write_bytes_per_s=TOTAL / 4)
    for now_s in (0, 1, 2, 60, 61):  # a pause does not count
        it.begin(now_s)
    learn(it, SIZES)
    it.observe(ssd=drive(TOTAL * 10))
    plan = renewed(it, SIZES)
    assert 0 < plan.schedule.moved_bytes <= TOTAL / 4


def test_only_the_kind_that_comes_is_planned_for() -> None:
    it = book()
    kinds = [(size * MIB, MIB) for size in range(1, 40)]
    for sizes in kinds:
        learn(it, sizes)
    it.observe(ssd=drive(TOTAL))
    assert it.planned == 0
    assert it.plan_like(kinds[7][:1]) is not None
    assert it.planned == 1
    assert it.planning_s > 0


def test_a_drive_to_which_nothing_goes_is_tried_again() -> None:
    it = book()
    learn(it, SIZES)
    it.observe(ssd=drive(1e4))
    assert staying(it, SIZES) == REGIONS
    seen = drive(1e4)
    for _ in range(16):
        assert it.probe_bytes == 0
        it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
        it.observe(ssd=seen)
    assert it.probe_bytes > 0, "nobody knows whether it still is so slow"
    nbytes, busy_s = 1e4 + TOTAL, 1 + 1 / 10
    it.observe(ssd=((nbytes, busy_s), (nbytes, busy_s)))
    assert staying(it, SIZES) < REGIONS // 2


def test_what_stays_in_host_memory_is_bounded_by_the_link_and_not_by_staging() -> None:
    it = book(tier_bytes={"host": math.inf}, staging_bytes=4096)
    learn(it, SIZES)
    it.observe(link=drive(TOTAL * 10))
    plan = renewed(it, SIZES)
    assert plan.tiers.count("host") > REGIONS / 2


def test_bytes_for_the_ssd_pass_the_link_first() -> None:
    moved = []
    for link in (0.2, 10):
        it = book()
        learn(it, SIZES)
        it.observe(link=drive(TOTAL * link), ssd=drive(TOTAL * 10))
        moved.append(renewed(it, SIZES).tiers.count("ssd"))
    assert moved[0] < moved[1] / 2


def test_both_tiers_take_more_than_one_where_the_ssd_is_slow() -> None:
    moved = []
    for tiers in ({"ssd": math.inf}, {"host": TOTAL / 2, "ssd": math.inf}):
        it = book(tier_bytes=tiers)
        learn(it, SIZES)
        it.observe(link=drive(TOTAL * 10), ssd=drive(TOTAL * 0.3))
        moved.append(REGIONS - renewed(it, SIZES).tiers.count("device"))
    assert moved[1] > moved[0]


def test_a_window_that_users_set_is_planned_with() -> None:
    plans = []
    for window in (None, 8 * MIB):
        it = book(tier_bytes={"host": math.inf}, window_bytes=window)
        learn(it, SIZES)
        it.observe(link=drive(TOTAL * 0.6))
        plans.append(renewed(it, SIZES))
    free, bounded = plans
    assert free.schedule.window_bytes > 8 * MIB >= bounded.schedule.window_bytes
    assert bounded.tiers.count("host") > 0
    assert bounded.schedule.peak_bytes >= free.schedule.peak_bytes


def test_a_drive_that_changed_once_has_blocks_chosen_anew_once() -> None:
    it = book()
    kinds = [SIZES, (2 * MIB,) * REGIONS]
    seen = 1.0
    for kind in kinds:
        learn(it, kind)
        it.observe(ssd=drive(TOTAL * seen, seen))
        it.plan_like(kind)
    chosen = []
    it.blocks.drive_changed = lambda: chosen.append(1)  # type: ignore[method-assign]
    written = TOTAL * seen
    for step in range(1, 40):  # a tenth of what it was; one of the two kinds never comes again
        it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
        written += TOTAL
        it.observe(ssd=((written, seen + step * 10), (written, seen + step * 10)))
        it.plan_like(SIZES)
    assert 1 <= len(chosen) <= 6, "the mean needs some steps to come down"


def test_much_slower_is_noticed_long_before_a_little_slower() -> None:
    it = book()
    learn(it, SIZES)
    it.observe(ssd=drive(TOTAL * 2))
    it.plan_like(SIZES)
    (entry,) = it._entries.values()
    entry.patience = 64
    noticed = {}
    for change in (1.5, 10.0):
        entry.stale, entry.uses = False, 0
        for step in range(1, 100):
            it.learn(SIZES, list(reversed(range(REGIONS))), None, 1)
            it.rates["ssd"].throughput = type(it.rates["ssd"].throughput)(
                *(rate / change for rate in entry.plan.rates["ssd"])  # type: ignore[union-attr]
            )
            it.observe()
            if entry.stale:
                noticed[change] = step
                break
    assert noticed == {1.5: 64, 10.0: 8}


def test_what_cannot_be_learned_from_is_told_once_and_breaks_nothing() -> None:
    it = book()
    it.failed(ValueError("a clock went backwards"))
    it.several_devices = True
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            it.say_what_is_wrong()
    texts = sorted(str(each.message) for each in said)
    assert len(texts) == 2
    assert "several devices" in texts[0]
    assert "a clock went backwards" in texts[1]
