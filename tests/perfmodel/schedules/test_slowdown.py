"""How much longer a step becomes: no longer than must, and no longer than said."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.schedules.activations import plan_activations
from perfmodel.schedules.replay import KEPT, Replay
from perfmodel.schedules.slowdown import Slowdowns, slowed_to_fit
from perfmodel.schedules.trace import Channel, Limits, SavedTensor, Trace
from tests.perfmodel.schedules.exact import exact_peak, random_case

SEEDS = st.integers(0, 2**32)


def longer(trace: Trace, factor: float) -> Trace:
    """The same step, by `factor` slower from its begin to its end."""
    return Trace(
        tuple(
            SavedTensor(
                tensor.nbytes,
                tensor.saved_s * factor,
                tensor.needed_s * factor,
                tensor.released_s * factor,
                tensor.held,
            )
            for tensor in trace.tensors
        )
    )


@given(SEEDS, st.sampled_from([0.0, 0.01, 0.1, 1.0]))
def test_in_a_step_that_takes_so_much_longer_nothing_waits(seed: int, slowdown: float) -> None:
    trace, channel, limits = random_case(random.Random(seed))
    plan = plan_activations(trace, [channel], limits, slowdown=slowdown)
    assert plan.slowdown == slowdown
    choice = [KEPT if tier == "device" else 0 for tier in plan.tiers]
    # A hair longer, since times in another unit differ in their last bits.
    outcome = Replay(longer(trace, (1 + slowdown) * (1 + 1e-9)), [channel], limits).run(choice)
    assert outcome.broken < 0
    assert outcome.peak_bytes == plan.peak_bytes


@given(SEEDS)
def test_a_longer_step_never_needs_more_memory(seed: int) -> None:
    trace, channel, limits = random_case(random.Random(seed), most=8)
    peaks = [
        plan_activations(trace, [channel], limits, slowdown=slowdown).peak_bytes
        for slowdown in (0.0, 0.2, 1.0, 50.0)
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_a_limit_is_met_with_about_the_least_slowdown_that_any_choice_allows() -> None:
    rng = random.Random(3)
    excess = []
    while len(excess) < 150:
        case = random_case(rng, most=8)
        trace, channel, limits = case
        at_once = exact_peak(trace, channel, limits)
        in_the_end = exact_peak(trace, faster(channel, 64), limits)
        if in_the_end == at_once:
            continue
        memory_bytes = rng.randint(in_the_end, at_once - 1)
        plan = slowed_to_fit(
            plan_activations(trace, [channel], limits, memory_bytes),
            trace,
            [channel],
            limits,
            memory_bytes,
        )
        assert plan.peak_bytes <= memory_bytes
        low, high = 1.0, 64.0
        while high > 1.001 * low:
            middle = math.sqrt(low * high)
            if exact_peak(trace, faster(channel, middle), limits) <= memory_bytes:
                high = middle
            else:
                low = middle
        excess.append((1 + plan.slowdown) / high - 1)
    assert min(excess) > -0.002
    assert statistics.median(excess) <= 0.02
    assert max(excess) <= 0.021


def faster(channel: Channel, factor: float) -> Channel:
    return replace(
        channel,
        write_bytes_per_s=channel.write_bytes_per_s * factor,
        read_bytes_per_s=channel.read_bytes_per_s * factor,
        latency_s=channel.latency_s / factor,
    )


@given(SEEDS)
def test_what_fits_is_left_as_it_is(seed: int) -> None:
    trace, channel, limits = random_case(random.Random(seed), most=8)
    plan = plan_activations(trace, [channel], limits)
    assert slowed_to_fit(plan, trace, [channel], limits, plan.peak_bytes) is plan


def test_a_limit_out_of_reach_gets_the_least_peak_and_no_more_time_than_that_takes() -> None:
    tensors = [SavedTensor(100, 0.1 * n, 2 - 0.1 * n, 2.05 - 0.1 * n) for n in range(10)]
    trace = Trace((*tensors, SavedTensor(500, 0.95, 0.96, 0.97, held=True)))
    channel = Channel(tier="ssd", write_bytes_per_s=100, read_bytes_per_s=100)
    plan = plan_activations(trace, [channel], Limits(), 1)
    found = slowed_to_fit(plan, trace, [channel], Limits(), 1)
    slowest = plan_activations(trace, [channel], Limits(), slowdown=63.0)
    assert found.peak_bytes == slowest.peak_bytes < plan.peak_bytes
    assert 0 < found.slowdown < 40


def test_tensors_needed_right_after_each_other_fit_whatever_the_drive() -> None:
    # Of a real step of 0.2 s, at the end of a fast forward with a drive of 24 MB/s.
    mib, count = 1 << 20, 24
    tensors = [
        SavedTensor(mib, 4e-3 * n, 0.2 - 2e-4 * n, 0.2 - 2e-4 * (n - 1)) for n in range(count)
    ]
    trace = Trace(tuple(tensors))
    channel = Channel(tier="ssd", write_bytes_per_s=24e6, read_bytes_per_s=24e6)
    plan = plan_activations(trace, [channel], Limits(), 4 * mib)
    assert plan.peak_bytes > 4 * mib
    assert slowed_to_fit(plan, trace, [channel], Limits(), 4 * mib).peak_bytes <= 4 * mib


def test_a_slowdown_that_is_none_is_refused() -> None:
    trace = Trace((SavedTensor(1, 0, 1, 2),))
    for wrong in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="slowdown"):
            plan_activations(trace, [], slowdown=wrong)


@given(SEEDS)
def test_what_one_limit_found_out_changes_nothing_for_the_next(seed: int) -> None:
    rng = random.Random(seed)
    trace, channel, limits = random_case(rng)
    limits = replace(limits, window_bytes=math.inf)
    shared = Slowdowns(trace, [channel], limits)
    effort = rng.choice([0.0, 0.0, 0.1])
    for _ in range(6):
        memory_bytes = rng.randint(0, trace.kept_peak_bytes)
        plan = plan_activations(trace, [channel], limits, memory_bytes, effort=effort)
        alone = slowed_to_fit(plan, trace, [channel], limits, memory_bytes, effort)
        assert shared.to_fit(plan, memory_bytes, effort) == alone
