"""The size of subgroups is the one that a simulation of whole steps finds as good as any."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.plan import OptimizerConfig
from perfmodel.schedules.subgroup_size import (
    LEAST_STAGED,
    PAD_BYTES,
    planned_subgroup_params,
    streamed_subgroup_params,
)
from perfmodel.schedules.updates import STATE_BYTES, UpdateRates, plan_updates, simulate_updates

SIZES = [1 << power for power in range(20, 27)]


def rates(host: float = 2.56e9, subgroup_s: float = 1e-4, duplex: bool = True) -> UpdateRates:
    return UpdateRates(
        device_params_per_s=25e9,
        host_params_per_s=host,
        to_device_bytes_per_s=46.2e9,
        to_host_bytes_per_s=46.2e9,
        subgroup_s=subgroup_s,
        duplex=duplex,
    )


def simulated_s(size: int, count: int, of: UpdateRates) -> float:
    whole, rest = divmod(count, size)
    sizes = [size] * whole + [rest] * (rest > 0)
    return simulate_updates(plan_updates(sizes, of), of).duration_s


@pytest.mark.parametrize("host", [0.3e9, 2.56e9])
@pytest.mark.parametrize("subgroup_s", [5e-5, 1e-4, 3e-4])
@pytest.mark.parametrize("count", [200_000_000, 1_300_000_000])
def test_the_chosen_size_takes_no_longer_than_the_best_that_is_simulated(
    host: float, subgroup_s: float, count: int
) -> None:
    of = rates(host, subgroup_s)
    chosen = planned_subgroup_params(count, of, device_bytes=80 << 30)
    best_s = min(simulated_s(size, count, of) for size in SIZES if count / size < 400)
    assert simulated_s(chosen, count, of) <= 1.04 * best_s


def test_costly_subgroups_are_larger_and_a_fixed_size_would_lose() -> None:
    count = 2_700_000_000
    sizes = [
        planned_subgroup_params(count, rates(subgroup_s=each), device_bytes=80 << 30)
        for each in (0.0, 1e-4, 3e-4)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]
    costly = rates(subgroup_s=3e-4)
    assert simulated_s(4 << 20, count, costly) > 1.15 * simulated_s(sizes[2], count, costly)


@settings(deadline=None)
@given(
    count=st.integers(1, 10**11),
    host=st.floats(1e6, 1e11),
    subgroup_s=st.floats(0, 1e-2),
    duplex=st.booleans(),
    device_bytes=st.integers(1 << 28, 1 << 38),
    most=st.none() | st.integers(1, 1 << 30),
)
def test_buffers_stay_within_their_part_of_the_device(
    count: int, host: float, subgroup_s: float, duplex: bool, device_bytes: int, most: int | None
) -> None:
    of = rates(host, subgroup_s, duplex)
    size = planned_subgroup_params(count, of, device_bytes=device_bytes, most=most)
    assert 1 <= size <= (most or 1 << 40)
    assert size <= max(1 << 20, device_bytes // 64 // (2 * STATE_BYTES))
    assert size < 2 * max(count, 1 << 20)


@given(
    staging_bytes=st.integers(1 << 16, 1 << 34),
    block=st.integers(1, 1 << 12),
    queue_depth=st.integers(1, 4096),
)
def test_staging_holds_three_of_what_comes_from_an_ssd(
    staging_bytes: int, block: int, queue_depth: int
) -> None:
    config = OptimizerConfig(
        placement="ssd",
        path=("/a",),
        staging_bytes=staging_bytes,
        block_bytes=4096 * block,
        queue_depth=queue_depth,
    )
    size = streamed_subgroup_params(config, from_ssd=True)
    assert LEAST_STAGED * (STATE_BYTES * size + PAD_BYTES) <= staging_bytes
    assert size <= max(1, streamed_subgroup_params(config, from_ssd=False))


def test_by_default_a_subgroup_fills_the_queue_of_a_drive() -> None:
    config = OptimizerConfig()
    size = streamed_subgroup_params(config, from_ssd=True)
    assert size == 4 << 20
    assert 8 * size >= config.block_bytes * config.queue_depth
