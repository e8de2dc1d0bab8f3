"""Plans of `perfmodel.schedules.activations` against the optimum, the published cut, and limits."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from perfmodel.schedules import activations
from perfmodel.schedules.activations import effort_for, plan_activations
from perfmodel.schedules.prefix_cut import prefix_cut
from perfmodel.schedules.replay import KEPT, Replay
from perfmodel.schedules.trace import Channel, Limits, SavedTensor, Trace
from tests.perfmodel.schedules.exact import exact_peak, random_case, shared_case

SEEDS = st.integers(0, 2**32)


def layered(layers: int, sizes: tuple[int, ...]) -> Trace:
    """A step whose forward takes a second, its backward two, and whose lifetimes are nested."""
    count = layers * len(sizes)
    slot_s = 1 / count
    tensors = []
    for index in range(count):
        saved_s = slot_s * (index + 1)
        needed_s = 1 + 2 * slot_s * (count - 1 - index)
        tensors.append(
            SavedTensor(
                sizes[index % len(sizes)], saved_s, max(saved_s, needed_s), needed_s + slot_s
            )
        )
    return Trace(tuple(tensors))


def ssd(rate: float, **more: float) -> Channel:
    return Channel(tier="ssd", write_bytes_per_s=rate, read_bytes_per_s=rate, **more)


@pytest.mark.parametrize("cases", [250, pytest.param(2000, marks=pytest.mark.soak)])
def test_the_peak_is_within_a_few_percent_of_the_best_of_all_subsets(cases: int) -> None:
    rng = random.Random(7)
    gaps = []
    for _ in range(cases):
        trace, channel, limits = random_case(rng)
        best = exact_peak(trace, channel, limits)
        found = plan_activations(trace, [channel], limits).peak_bytes
        assert found >= best
        gaps.append(found / best - 1)
    assert statistics.median(gaps) <= 0.03
    assert max(gaps) <= 0.10


@pytest.mark.parametrize(("fewest", "most", "count"), [(11, 14, 40), (17, 17, 4)])
def test_where_not_all_subsets_are_tried_the_peak_is_as_close(
    monkeypatch: pytest.MonkeyPatch, fewest: int, most: int, count: int
) -> None:
    monkeypatch.setattr(activations, "_FEW_CHOICES", 0)
    rng = random.Random(13)
    gaps = []
    while len(gaps) < count:
        trace, channel, limits = random_case(rng, most)
        if len(trace.tensors) >= fewest:
            found = plan_activations(trace, [channel], limits).peak_bytes
            gaps.append(found / exact_peak(trace, channel, limits) - 1)
    assert min(gaps) >= 0
    assert statistics.median(gaps) <= 0.03
    assert max(gaps) <= 0.10


def test_storages_that_are_shared_are_planned_as_well() -> None:
    rng = random.Random(17)
    gaps = []
    for _ in range(150):
        trace, channel, limits = shared_case(rng, most=12)
        found = plan_activations(trace, [channel], limits).peak_bytes
        gaps.append(found / exact_peak(trace, channel, limits) - 1)
    assert min(gaps) >= 0
    assert statistics.median(gaps) <= 0.03
    assert max(gaps) <= 0.10


@pytest.mark.parametrize(("most", "count", "effort"), [(60, 10_000, 0.0), (40, 60, 1.0)])
def test_no_plan_is_worse_than_the_published_prefix_cut(
    most: int, count: int, effort: float
) -> None:
    rng = random.Random(11)
    compared = 0
    for _ in range(count):
        trace, channel, limits = random_case(rng, most)
        replay = Replay(trace, [channel], limits)
        cut = replay.run(prefix_cut(trace, channel))
        found = plan_activations(trace, [channel], limits, effort=effort)
        if cut.broken < 0:  # else the cut stalls, and the plan does not
            assert found.peak_bytes <= cut.peak_bytes
            compared += 1
    assert compared > count // 20


def test_what_stays_of_a_storage_keeps_all_of_it() -> None:
    whole = SavedTensor(10, 0.0, 9.0, 9.0, storage=0, rest_bytes=90)
    second = SavedTensor(10, 1.0, 2.0, 2.0, storage=0)
    later = SavedTensor(50, 3.0, 4.0, 4.0)
    trace = Trace((whole, second, later))
    assert trace.kept_peak_bytes == 160, "the second is there for as long as the first"
    drive = ssd(1000.0)
    assert Replay(trace, [drive], Limits()).run([KEPT] * 3).peak_bytes == 160
    plan = plan_activations(trace, [drive], Limits(), 120)
    assert plan.tiers == ("ssd", "ssd", "device"), "20 bytes leave, and 110 are free"
    assert plan.peak_bytes <= 120


@given(SEEDS)
def test_what_a_plan_promises_holds_when_it_is_replayed(seed: int) -> None:
    trace, channel, limits = random_case(random.Random(seed))
    plan = plan_activations(trace, [channel], limits)
    choice = [KEPT if tier == "device" else 0 for tier in plan.tiers]
    outcome = Replay(trace, [channel], limits).run(choice)
    assert outcome.broken < 0
    assert outcome.peak_bytes == plan.peak_bytes <= trace.kept_peak_bytes
    assert outcome.staging_peak_bytes <= limits.staging_bytes
    for tensor, tier, read_s, written_s in zip(
        trace.tensors, plan.tiers, plan.read_s, outcome.written_s, strict=True
    ):
        assert tier == "device" or not tensor.held
        if tier == "ssd":
            assert written_s <= read_s + 1e-9
            assert read_s + channel.read_s(tensor.nbytes) <= tensor.needed_s + 1e-9


@given(SEEDS)
def test_every_read_begins_once_and_before_its_tensor_is_asked_for(seed: int) -> None:
    trace, channel, limits = random_case(random.Random(seed))
    plan = plan_activations(trace, [channel], limits)
    needed_s = [trace.tensors[index].needed_s for index in plan.order]
    assert needed_s == sorted(needed_s)
    place = {index: at for at, index in enumerate(plan.order)}
    groups = enumerate((plan.reads_first, *plan.reads_before), -1)
    begun = [(index, at) for at, some in groups for index in some]
    assert sorted(index for index, _ in begun) == [
        index for index, tier in enumerate(plan.tiers) if tier != "device"
    ]
    asked_s = [-math.inf, *needed_s]
    for index, at in begun:
        assert at < place[index], "when an earlier one is asked for, or before any is"
        assert asked_s[at + 1] <= plan.read_s[index], "and then the read is not late"


@given(SEEDS, st.floats(0.05, 1))
def test_within_a_memory_limit_no_more_moves_than_must(seed: int, part: float) -> None:
    trace, channel, limits = random_case(random.Random(seed))
    least = plan_activations(trace, [channel], limits)
    target = round(least.peak_bytes + part * (trace.kept_peak_bytes - least.peak_bytes))
    within = plan_activations(trace, [channel], limits, memory_bytes=target)
    assert within.peak_bytes <= target
    choice = [KEPT if tier == "device" else 0 for tier in within.tiers]
    for index, option in enumerate(choice):
        if option != KEPT:
            less = [KEPT if at == index else one for at, one in enumerate(choice)]
            outcome = Replay(trace, [channel], limits).run(less)
            assert outcome.broken >= 0 or outcome.peak_bytes > target


def test_more_bandwidth_never_needs_more_memory() -> None:
    trace = layered(24, (4, 1, 8, 2, 2))
    total = sum(tensor.nbytes for tensor in trace.tensors)
    peaks = [
        plan_activations(trace, [ssd(total * rate)]).peak_bytes for rate in (0.1, 0.25, 0.5, 1, 2)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 0.85 * total
    assert peaks[-1] < 0.05 * total


def test_two_channels_take_more_than_either() -> None:
    trace = layered(12, (4, 1, 8, 2, 2))
    total = sum(tensor.nbytes for tensor in trace.tensors)
    host = Channel(tier="host", write_bytes_per_s=total / 3, read_bytes_per_s=total / 3)
    both = plan_activations(trace, [ssd(total / 4), host])
    assert set(both.tiers) == {"device", "host", "ssd"}
    alone = [plan_activations(trace, [one]).peak_bytes for one in (ssd(total / 4), host)]
    assert both.peak_bytes < 0.8 * min(alone)


@pytest.mark.parametrize(
    ("bound", "value"), [("capacity_bytes", 100), ("written_bytes", 100), ("staging_bytes", 40)]
)
def test_bounds_of_tier_drive_and_staging_hold(bound: str, value: int) -> None:
    trace = layered(8, (4, 1, 8, 2, 2))
    channel_bounds = {bound: value} if bound != "staging_bytes" else {}
    staging = value if bound == "staging_bytes" else math.inf
    plan = plan_activations(trace, [ssd(1e6, **channel_bounds)], Limits(staging_bytes=staging))
    assert plan.moved_bytes > 0
    assert plan.staging_peak_bytes <= staging
    if bound != "staging_bytes":
        assert plan.moved_bytes <= value


def test_where_writes_and_reads_meet_both_are_priced_at_what_goes_through_together() -> None:
    # The second is still being written when the first has to be read; only then do they compete.
    first, second = SavedTensor(10, 0.0, 2.0, 2.0), SavedTensor(10, 0.5, 9.0, 9.0)
    trace = Trace((first, second))
    for mixed, leaves in ((10.0, True), (6.0, False)):
        channel = ssd(10.0, mixed_bytes_per_s=mixed)
        assert (Replay(trace, [channel], Limits()).run([0, 0]).broken < 0) == leaves
    later = Trace((SavedTensor(10, 0.0, 20.0, 20.0), second))
    assert Replay(later, [ssd(10.0, mixed_bytes_per_s=2.0)], Limits()).run([0, KEPT]).broken < 0


def test_fifty_thousand_tensors_are_planned_like_five_hundred() -> None:
    sizes = (4, 1, 8, 2, 2)
    few, many = layered(100, sizes), layered(10_000, sizes)
    peaks = []
    for trace in (few, many):
        total = sum(tensor.nbytes for tensor in trace.tensors)
        plan = plan_activations(trace, [ssd(total / 2)], Limits(staging_bytes=total / 16))
        peaks.append(plan.peak_bytes / total)
    assert peaks[1] <= peaks[0] * 1.02


@pytest.mark.parametrize("tensors", [(), (SavedTensor(5, 0, 1, 1, held=True),)])
def test_what_cannot_move_is_kept(tensors: tuple[SavedTensor, ...]) -> None:
    plan = plan_activations(Trace(tensors), [ssd(10)])
    assert plan.tiers == ("device",) * len(tensors)
    assert plan.moved_bytes == 0
    assert plan_activations(Trace(tensors), []).tiers == plan.tiers


def test_an_impossible_tensor_or_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="impossible"):
        SavedTensor(1, 2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="order in which they were saved"):
        Trace((SavedTensor(1, 2, 3, 4), SavedTensor(1, 1, 3, 4)))
    with pytest.raises(ValueError, match="read_bytes_per_s=0"):
        Channel(tier="ssd", write_bytes_per_s=1, read_bytes_per_s=0)


@given(SEEDS)
@example(989)
def test_copies_hold_no_more_of_the_device_than_the_window(seed: int) -> None:
    rng = random.Random(seed)
    trace, channel, limits = random_case(rng)
    free = plan_activations(trace, [channel], limits)
    largest = max(tensor.nbytes for tensor in trace.tensors)
    window_bytes = rng.randint(1, max(1, free.window_bytes))
    plan = plan_activations(trace, [channel], replace(limits, window_bytes=window_bytes))
    assert plan.window_bytes <= max(window_bytes, largest)
    same = plan_activations(trace, [channel], replace(limits, window_bytes=free.window_bytes))
    assert same.peak_bytes <= free.peak_bytes


def test_a_large_tensor_that_stays_makes_the_window_no_wider() -> None:
    large = SavedTensor(10_000, 0.0, 3.0, 3.1, held=True)
    small = [SavedTensor(100, 0.01 * at, 2.9 - 0.02 * at, 2.91 - 0.02 * at) for at in range(1, 64)]
    channel = ssd(6000.0, staged=False)
    plan = plan_activations(Trace((large, *small)), [channel], Limits(window_bytes=200))
    assert 100 <= plan.window_bytes <= 200
    alone = plan_activations(Trace((*small,)), [channel], Limits(window_bytes=50))
    assert alone.window_bytes == 100


def test_what_is_not_staged_takes_no_staging() -> None:
    tensors = tuple(SavedTensor(100, at, 10 + at, 11 + at) for at in range(4))
    ways = {"write_bytes_per_s": 1e3, "read_bytes_per_s": 1e3}
    limits = Limits(staging_bytes=0)
    for staged in (True, False):
        channel = Channel(tier="host", staged=staged, **ways)
        plan = plan_activations(Trace(tensors), [channel], limits)
        assert ("host" in plan.tiers) is not staged
        assert plan.staging_peak_bytes == 0


def test_many_tensors_leave_through_a_small_window() -> None:
    count = 6000
    slot_s = 1 / count
    tensors = tuple(
        SavedTensor(100, slot_s * at, 3 - 2 * slot_s * at, 3 - 2 * slot_s * at + slot_s)
        for at in range(count)
    )
    trace = Trace(tensors)
    rate = 1.5 * 100 * count
    channel = Channel(tier="host", write_bytes_per_s=rate, read_bytes_per_s=rate, staged=False)
    free = plan_activations(trace, [channel])
    for part in (1, 2):
        window_bytes = max(200, free.window_bytes // part)
        plan = plan_activations(trace, [channel], Limits(window_bytes=window_bytes))
        assert plan.window_bytes <= window_bytes
        assert plan.peak_bytes < trace.kept_peak_bytes // 10


def test_memory_that_is_shared_is_free_only_when_all_its_tensors_have_left() -> None:
    drive = Channel(tier="ssd", write_bytes_per_s=1000, read_bytes_per_s=1000)

    def trace(shared: bool) -> Trace:
        """Eight storages of two halves each; the second halves are saved late."""
        first = [SavedTensor(50, at, 40 - at, 41 - at, storage=at) for at in range(8)]
        second = [
            SavedTensor(50, 8 + at, 32 - at, 33 - at, storage=at if shared else -1)
            for at in range(8)
        ]
        return Trace((*first, *second))

    for limit in (450, 500, 600):  # all first halves are there before any of the second ones
        plan = plan_activations(trace(shared=True), [drive], Limits(), limit)
        assert plan.tiers[:8] == plan.tiers[8:], "a storage with one half there is all there"
        stays = 50 * plan.tiers.count("device")
        assert stays <= plan.peak_bytes <= limit
        assert sorted(plan.order) == list(range(16))
        read = {index for reads in (plan.reads_first, *plan.reads_before) for index in reads}
        assert read == {index for index, tier in enumerate(plan.tiers) if tier == "ssd"}
    assert plan_activations(trace(shared=False), [drive], Limits(), 300).peak_bytes <= 300


def test_less_effort_is_a_plan_that_holds_and_never_a_better_one() -> None:
    for seed in range(20):
        trace, channel, limits = random_case(random.Random(seed), most=30)
        best = plan_activations(trace, [channel], limits).peak_bytes
        for effort in (0.0, 0.02, 0.15):
            found = plan_activations(trace, [channel], limits, effort=effort)
            assert best <= found.peak_bytes <= trace.kept_peak_bytes
    with pytest.raises(ValueError, match="not a part of the search"):
        plan_activations(trace, [channel], limits, effort=1.5)


def test_a_short_step_is_worth_less_search_than_a_long_one() -> None:
    def of(released_s: float) -> float:
        return effort_for(Trace((SavedTensor(1, 0.0, released_s, released_s),)))

    assert 0 < of(0.1) < of(0.4) < of(2.0) == of(60.0) == 1.0
    assert effort_for(Trace(())) == 0.0
