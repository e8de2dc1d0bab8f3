"""Tests of `perfmodel.schedules.updates`: shares, strides and ratios, and which is the fastest."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.schedules.updates import (
    STATE_BYTES,
    UpdateRates,
    UpdateSchedule,
    plan_updates,
    ratio_schedule,
    share_schedule,
    simulate_updates,
    stride_schedule,
)

SIZES = (100,) * 40
# An H100 as it is derived from the published sweeps, a parameter a nanosecond: 0.35 ns on the host,
# 0.217 each way for the states, 0.036 for the parameter.
H100 = UpdateRates(
    device_params_per_s=1 / 0.01,
    host_params_per_s=1 / 0.35,
    to_device_bytes_per_s=STATE_BYTES / 0.217,
    to_host_bytes_per_s=STATE_BYTES / 0.217,
)


def rates(**other: Any) -> UpdateRates:
    return UpdateRates(**{name: getattr(H100, name) for name in H100.__dataclass_fields__} | other)


@given(st.lists(st.integers(1, 50), max_size=60), st.floats(0, 1), st.floats(0, 1))
def test_a_share_is_met_as_closely_as_whole_subgroups_can(
    sizes: list[int], share: float, resident: float
) -> None:
    schedule = share_schedule(sizes, share, resident=resident)
    total, most = sum(sizes), max(sizes, default=0)
    stays = schedule.share("resident") * total
    assert resident * total - most <= stays <= resident * total * (1 + 1e-6) + 1e-6
    moved = schedule.share("moved") * total
    assert abs(moved - share * (total - stays)) <= most / 2 + 1e-6
    first = schedule.places.index("resident") if "resident" in schedule.places else len(sizes)
    assert set(schedule.places[first:]) <= {"resident"}, "what stays is at the tail"


def test_a_stride_and_a_ratio_are_what_their_authors_code_does() -> None:
    assert stride_schedule(SIZES[:6], 2).places == ("host", "moved") * 3
    assert stride_schedule(SIZES[:6], 3).places == ("host", "host", "moved") * 2
    assert stride_schedule(SIZES[:4], 1).places == ("moved",) * 4
    assert stride_schedule(SIZES[:4], 0).places == ("host",) * 4
    places = stride_schedule(SIZES[:4], 2, resident=0.5).places
    assert places == ("host", "moved", "resident", "resident")
    assert ratio_schedule(SIZES[:5], 0.5).places == ("host",) * 2 + ("resident",) * 3
    assert ratio_schedule(SIZES[:2], 1.0).places == ("host",) * 2


def test_everyone_has_one_way_to_do_all_on_one_side() -> None:
    host = simulate_updates(share_schedule(SIZES, 0.0), H100)
    assert host.busy_s("host") == pytest.approx(4000 * 0.35)
    assert host.duration_s == pytest.approx(4000 * 0.35 + 100 * 0.217 / 6)
    moved = simulate_updates(share_schedule(SIZES, 1.0, buffers=3), H100)
    assert moved.duration_s == pytest.approx(4000 * 0.217 + 100 * (0.217 + 0.01))
    resident = simulate_updates(share_schedule(SIZES, 0.0, resident=1.0), H100)
    assert resident.duration_s == pytest.approx(4000 * 0.01)


def test_parameters_on_the_host_come_along_with_what_moves_and_stay_otherwise() -> None:
    beside = rates(params_on="host", param_bytes=4)
    host = simulate_updates(share_schedule(SIZES, 0.0), beside)
    assert host.duration_s == pytest.approx(4000 * 0.35)
    moved = simulate_updates(share_schedule(SIZES, 1.0, buffers=3), beside)
    there, back = 0.217 * 16 / 12, 0.217  # its gradient as well; it is its own master copy
    assert moved.duration_s == pytest.approx(4000 * there + 100 * (back + 0.01))
    with pytest.raises(ValueError, match="params_on='ssd'"):
        rates(params_on="ssd")


def test_the_best_share_is_what_the_rates_ask_for_and_no_integer_stride_has_it() -> None:
    sizes = (100,) * 200
    best = plan_updates(sizes, H100, buffers=3)
    # m moved: m * 0.217 + (1 - m) * 0.036 = (1 - m) * 0.35
    assert best.share("moved") == pytest.approx(0.314 / 0.531, abs=0.02)
    time_s = simulate_updates(best, H100).duration_s
    strides = [
        simulate_updates(stride_schedule(sizes, stride, buffers=3), H100).duration_s
        for stride in range(11)
    ]
    assert time_s < 0.87 * min(strides)
    assert time_s >= (1 - best.share("moved")) * sum(sizes) * 0.35


def test_one_set_of_buffers_has_the_copies_take_turns() -> None:
    one, two = (
        simulate_updates(share_schedule(SIZES, 1.0, buffers=buffers), H100).duration_s
        for buffers in (1, 3)
    )
    assert one == pytest.approx(4000 * (2 * 0.217 + 0.01))
    assert two < 0.55 * one
    half = simulate_updates(share_schedule(SIZES, 1.0, buffers=3), rates(duplex=False)).duration_s
    assert half == pytest.approx(4000 * 2 * 0.217, rel=0.02), "a link of one direction at a time"


def test_host_memory_is_a_roof_for_updates_and_copies_together() -> None:
    schedule = share_schedule(SIZES, 0.5, buffers=3)
    free = simulate_updates(schedule, H100)
    # 28 bytes of a parameter that is updated on the host and 2 of its copy, 24 of one that moves.
    traffic = free.used("host memory")
    assert traffic == 2000 * (28 + 2) + 2000 * 24
    roof = traffic / (2 * free.duration_s)
    bound = simulate_updates(schedule, rates(host_memory_bytes_per_s=roof))
    assert bound.duration_s >= 2 * free.duration_s * (1 - 1e-9)


def test_residents_save_what_they_need_not_move() -> None:
    times = []
    for resident in (0.0, 0.25, 0.5, 1.0):
        schedule = plan_updates(SIZES, H100, resident=resident)
        assert schedule.share("resident") == pytest.approx(resident, abs=0.03)
        times.append(simulate_updates(schedule, H100).duration_s)
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_few_subgroups_have_the_best_of_all_shares(count: int) -> None:
    sizes = (1000,) * count
    best = simulate_updates(plan_updates(sizes, H100), H100).duration_s
    all_of_them = [
        simulate_updates(share_schedule(sizes, moved / max(1, count)), H100).duration_s
        for moved in range(count + 1)
    ]
    assert best == min(all_of_them)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: share_schedule(SIZES, 1.5), "share of 1.5"),
        (lambda: share_schedule(SIZES, 0.5, resident=-0.1), "share of -0.1"),
        (lambda: stride_schedule(SIZES, -1), "stride of -1"),
        (lambda: ratio_schedule(SIZES, 2), "ratio=2"),
        (lambda: share_schedule(SIZES, 0.5, buffers=0), "buffers=0"),
        (lambda: UpdateSchedule((1, 2), ("host",)), "each needs one of"),
        (lambda: UpdateSchedule((1,), ("gpu",)), "each needs one of"),
        (lambda: UpdateSchedule((0,), ("host",)), "at least one parameter"),
        (lambda: rates(host_params_per_s=0), "host_params_per_s=0"),
        (lambda: rates(subgroup_s=-1), "subgroup_s=-1"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
