"""What a step waits that follows a schedule: nothing where none was planned, and never more."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from perfmodel.schedules.activations import ActivationSchedule, plan_activations
from perfmodel.schedules.slowdown import slowed_to_fit
from perfmodel.schedules.stall import stall_s
from perfmodel.schedules.trace import Channel, Limits, SavedTensor, Trace
from tests.perfmodel.schedules.exact import random_case, shared_case


def ssd(rate: float, **more: float) -> Channel:
    return Channel(tier="ssd", write_bytes_per_s=rate, read_bytes_per_s=rate, **more)


@pytest.mark.parametrize("case", [random_case, shared_case])
def test_a_plan_without_slowdown_waits_for_nothing(case: object) -> None:
    for seed in range(300):
        trace, channel, limits = case(random.Random(seed))  # type: ignore[operator]
        plan = plan_activations(trace, [channel], limits)
        assert stall_s(plan, trace, [channel], limits) <= 1e-9, seed
        assert stall_s(plan, trace, [channel], limits, plan.peak_bytes) <= 1e-9, seed


def test_a_slowed_step_waits_no_longer_than_planned_and_mostly_much_less() -> None:
    parts = []
    for seed in range(200):
        rng = random.Random(seed)
        trace, channel, limits = random_case(rng)
        plan = plan_activations(trace, [channel], limits, effort=0.0)
        target = int(plan.peak_bytes * rng.uniform(0.3, 0.95))
        slowed = slowed_to_fit(plan, trace, [channel], limits, target, 0.1)
        step_s = max(tensor.released_s for tensor in trace.tensors)
        waited_s = stall_s(slowed, trace, [channel], limits, max(target, slowed.peak_bytes))
        assert waited_s <= slowed.slowdown * step_s + 1e-9, seed
        if slowed.slowdown:
            parts.append(waited_s / (slowed.slowdown * step_s))
    assert len(parts) > 50
    assert sorted(parts)[len(parts) // 2] < 0.7


def test_the_wait_is_what_a_simple_step_says() -> None:
    # Two tensors of 100 bytes, one right after the other, at 100 bytes a second: the first must
    # have left before there is room for the second, and the second is read before the first.
    tensors = (SavedTensor(100, 0.0, 2.1, 2.2), SavedTensor(100, 0.1, 2.0, 2.1))
    trace, channel = Trace(tensors), ssd(100.0)
    plan = ActivationSchedule(
        tiers=("ssd", "ssd"),
        read_s=(1.2, 1.1),
        order=(1, 0),
        reads_first=(1, 0),
        reads_before=((), ()),
        peak_bytes=200,
        staging_peak_bytes=200,
        window_bytes=100,
        moved_bytes=200,
    )
    # Saved at 0 and at 1 (not 0.1): 0.9 s. Written at 2, read from then on: there at 3 and 4, but
    # wanted at 2.9 and, a tenth after the first came, at 3.1.
    assert stall_s(plan, trace, [channel], Limits(), 100) == pytest.approx(0.9 + 0.1 + 0.9)
    assert stall_s(plan, trace, [ssd(math.inf)], Limits(), 100) == 0.0


def test_a_slower_drive_never_waits_less() -> None:
    for seed in range(100):
        trace, channel, limits = random_case(random.Random(seed))
        plan = plan_activations(trace, [channel], limits, effort=0.0)
        waits = []
        for factor in (4.0, 1.0, 0.5, 0.25, 0.1):
            other = replace(
                channel,
                write_bytes_per_s=channel.write_bytes_per_s * factor,
                read_bytes_per_s=channel.read_bytes_per_s * factor,
            )
            waits.append(stall_s(plan, trace, [other], limits))
        assert waits == sorted(waits), seed
