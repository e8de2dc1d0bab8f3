"""Tests of `offload.activations.schedule_book`: what is recorded, planned, and planned again."""

from __future__ import annotations

import math
import warnings

import pytest

from offload.activations.plan import Plan
from offload.activations.recording import HostClock, Recording
from offload.activations.schedule_book import ScheduleBook

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


def recorded(regions: int = REGIONS, seconds: float = 1.0) -> Recording:
    """A second forward, a region at a time, and two of backward in the reverse order."""
    recording = Recording(HostClock(lambda: 0.0))
    slot_s = seconds / regions
    recording.saved = [100 + slot_s * number for number in range(regions)]
    recording.storages = list(range(regions))
    for number in range(regions):
        needed_s = 100 + seconds + 2 * slot_s * (regions - 1 - number)
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


@pytest.mark.parametrize("still", [True, False])
def test_a_second_step_confirms_the_first_and_what_is_held(still: bool) -> None:
    it = book()
    it.observe(ssd=drive(TOTAL * 10))
    for number, confirmed in enumerate((False, True, True)):
        recording = recorded()
        if number == 0 or still:
            recording.held.add(3)
        it.learn(SIZES, list(reversed(range(REGIONS))), recording, 1)
        plan = renewed(it, SIZES)
        assert plan.confirmed == confirmed
        assert plan.tiers[3] == ("device" if number == 0 or still else "ssd")
        assert plan.held == ({3} if number == 0 or still else set())
    assert it.planned == 2, "once confirmed, a recording changes nothing"


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


def test_regions_of_one_storage_go_together() -> None:
    it = book(memory_bytes=TOTAL // 2)
    recording = recorded()
    recording.storages = [number // 2 for number in range(REGIONS)]
    it.learn(SIZES, list(reversed(range(REGIONS))), recording, 1)
    it.observe(ssd=drive(TOTAL * 10))
    tiers = renewed(it, SIZES).tiers
    assert tiers[::2] == tiers[1::2]
    assert 0 < tiers.count("ssd") < REGIONS
