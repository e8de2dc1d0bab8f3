"""A device that updates some of what lies on the host: the bits of the host alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from offload.device.emulated_updates import EmulatedRates, EmulatedUpdates
from offload.native import FaultPlan, FaultRule
from tests.offload.optimizer.test_adamw import require_equal, run, states_of

Make = Callable[..., Any]


@pytest.fixture
def device() -> Iterator[EmulatedUpdates]:
    """An emulated device, slow enough for the host to be ahead; nothing may stay pinned."""
    made = EmulatedUpdates(
        EmulatedRates(
            device_params_per_s=1e8,
            host_params_per_s=1e7,
            to_device_bytes_per_s=4e8,
            to_host_bytes_per_s=4e8,
            jitter=0.2,
        )
    )
    yield made
    made.close()
    assert not made.pinned


def require_same(one: Any, params: list[Any], other: Any, others: list[Any]) -> None:
    """Fail unless parameters and states are the same."""
    assert all(torch.equal(each, beside) for each, beside in zip(params, others, strict=True))
    require_equal(states_of(one), states_of(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["auto", "host", "device", "share=0.4", "stride=2"])
@pytest.mark.parametrize("placement", ["host", "host=0.6,ssd=0.4"])
def test_what_the_device_updates_changes_no_bit(
    device: EmulatedUpdates,  # first, so that it is closed last
    adamw: Make,
    parameters: Make,
    give_grads: Make,
    dtype: torch.dtype,
    schedule: str,
    placement: str,
) -> None:
    params, others = parameters(dtype), parameters(dtype)
    optimizer = adamw(
        params,
        placement=placement,
        update_schedule=schedule,
        max_norm=1.0,
        lent_device=device,
    )
    plain = adamw(others, placement="host", max_norm=1.0)
    run(optimizer, params, give_grads, range(4))
    run(plain, others, give_grads, range(4))
    require_same(optimizer, params, plain, others)
    lent = optimizer._host_side.lent
    assert lent.schedule is not None
    moved = lent.schedule.share("moved")
    assert schedule in ("auto",) or (moved > 0) is (schedule != "host")
    bytes_in, _ = device.done()["states in"]
    assert (bytes_in > 0) is (moved > 0) or schedule == "auto"  # which has measured


def test_parameters_shown_one_after_the_other_are_each_updated_by_both(
    device: EmulatedUpdates, adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    optimizer = adamw(params, placement="host", update_schedule="share=0.5", lent_device=device)
    plain = adamw(others, placement="host")
    for step in range(3):
        give_grads(params, step)
        give_grads(others, step)
        for param in params:
            optimizer.step_of([param])
        plain.step()
    require_same(optimizer, params, plain, others)


def test_a_failing_drive_leaves_the_devices_part_updated_and_the_step_to_be_finished(
    device: EmulatedUpdates, adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    faults = FaultPlan(rules=[FaultRule(op="read", first=3, count=2, action="error", errno=5)])
    optimizer = adamw(
        params,
        placement="host=0.5,ssd=0.5",
        update_schedule="device",
        lent_device=device,
        io_engine=faults,
    )
    plain = adamw(others, placement="host")
    failures = 0
    for step in range(3):
        give_grads(params, step)
        give_grads(others, step)
        plain.step()
        for _ in range(200):
            try:
                optimizer.step()
                break
            except OSError:
                failures += 1
    assert failures
    require_same(optimizer, params, plain, others)


def test_a_device_is_not_lent_to_parameters_that_lie_on_one(
    device: EmulatedUpdates, adamw: Make, parameters: Make
) -> None:
    with pytest.raises(ValueError, match="lent_device updates what lies in host memory"):
        adamw(parameters(torch.float32), emulated_device=device, lent_device=device)
