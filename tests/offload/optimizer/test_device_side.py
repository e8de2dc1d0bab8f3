"""`offload.AdamW` beside an emulated device: the same bits at any placement and schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from offload.device.emulated_updates import EmulatedRates, EmulatedUpdates
from offload.native import FaultPlan, FaultRule
from offload.optimizer import placement
from perfmodel.schedules.updates import plan_updates
from tests.offload.optimizer.test_adamw import require_equal, run, states_of

Make = Callable[..., Any]
PLACEMENTS = ("host", "device", "device=0.3,host=0.7", "device=0.3,host=0.3,ssd=0.4")
SCHEDULES = ("auto", "host", "device", "share=0.3", "share=0.59", "stride=2")


@pytest.fixture
def device() -> Iterator[EmulatedUpdates]:
    """An emulated device; all memory that was pinned for it must have been given back."""
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


def train(optimizer: Any, params: list[Any], give_grads: Make, steps: range) -> list[Any]:
    return run(optimizer, params, give_grads, steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement_and_schedule_change_no_bit(
    adamw: Make,
    parameters: Make,
    give_grads: Make,
    device: EmulatedUpdates,
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
        emulated_device=device,
    )
    other = adamw(others, max_norm=1.0)
    found, expected = (
        train(optimizer, params, give_grads, range(4)),
        train(other, others, give_grads, range(4)),
    )
    assert all(map(torch.equal, found, expected))
    require_equal(states_of(optimizer), states_of(other))
    done = device.done()
    moved = done["states in"][0]
    if schedule in ("device", "share=0.59") and placement == "host":
        assert moved > 0
    if schedule == "host":
        assert moved == 0
    optimizer.close()
    assert not device.pinned


def test_missing_gradients_and_foreign_changes_are_taken_as_without_a_device(
    adamw: Make, parameters: Make, give_grads: Make, device: EmulatedUpdates
) -> None:
    results = []
    for settings in ({}, {"emulated_device": device, "update_schedule": "share=0.5"}):
        params = parameters(torch.bfloat16)
        optimizer = adamw(params, **settings)
        for step in range(5):
            give_grads(params, step)
            params[step].grad = None
            if step == 2:
                with torch.no_grad():
                    params[5].mul_(0.5)
            optimizer.step()
        results.append(([param.detach().clone() for param in params], states_of(optimizer)))
    (found, states), (expected, others) = results
    assert all(map(torch.equal, found, expected))
    require_equal(states, others)


def test_the_model_chooses_the_size_of_subgroups_where_none_is_given(
    adamw: Make, parameters: Make, give_grads: Make, device: EmulatedUpdates
) -> None:
    params, others = parameters(), parameters()
    before = sum(device.done()["states in"])
    optimizer = adamw(params, emulated_device=device, subgroup_params=None)
    assert optimizer.config.subgroup_params == 1 << 20, "all of these few are one"
    assert sum(device.done()["states in"]) > before, "the link was measured"
    train(optimizer, params, give_grads, range(3))
    whole = adamw(others)
    train(whole, others, give_grads, range(3))
    assert all(map(torch.equal, params, others))
    before = sum(device.done()["states in"])
    told = adamw(params, emulated_device=device, subgroup_params=None, update_schedule="host")
    assert told.config.subgroup_params == 32 * 4096 // 8, "which fill the queue"
    assert sum(device.done()["states in"]) == before, "nothing was to be measured"


def test_checkpoints_go_to_a_device_and_back(
    adamw: Make, parameters: Make, give_grads: Make, device: EmulatedUpdates, tmp_path: Any
) -> None:
    params, others = parameters(), parameters()
    file = tmp_path.parent / f"{tmp_path.name}.states"
    optimizer = adamw(params, emulated_device=device, placement="device=0.4,host=0.6")
    train(optimizer, params, give_grads, range(2))
    optimizer.save(file)
    there = adamw(params)
    there.load(file)
    train(there, params, give_grads, range(2, 4))
    back = adamw(params, emulated_device=device, update_schedule="device")
    back.load_state_dict(there.state_dict())
    train(back, params, give_grads, range(4, 6))
    whole = adamw(others)
    train(whole, others, give_grads, range(6))
    assert all(map(torch.equal, params, others))
    assert set(states_of(back)[0]) == {"step", "exp_avg", "exp_avg_sq"}
    require_equal(states_of(back), states_of(whole))


def test_a_read_that_fails_leaves_a_step_that_can_be_finished(
    adamw: Make, parameters: Make, give_grads: Make, device: EmulatedUpdates
) -> None:
    params, others = parameters(), parameters()
    optimizer = adamw(
        params,
        placement="ssd",
        emulated_device=device,
        io_engine=FaultPlan(rules=[FaultRule(op="read", first=7, count=1, action="error")]),
    )
    other = adamw(others)
    failed = 0
    for step in range(4):
        give_grads(params, step)
        give_grads(others, step)
        other.step()
        try:
            optimizer.step()
        except OSError:
            failed += 1
            optimizer.step()
    assert failed == 1
    assert all(map(torch.equal, params, others))


def test_the_planned_schedule_is_by_measured_rates(
    adamw: Make, give_grads: Make, device: EmulatedUpdates
) -> None:
    params = [torch.nn.Parameter(torch.randn(20_000).bfloat16()) for _ in range(12)]
    optimizer = adamw(params, subgroup_params=20_000, staging_bytes=1 << 22, emulated_device=device)
    train(optimizer, params, give_grads, range(1))
    side = optimizer.device_side
    assert side is not None
    assert side.rates is not None
    assert side.schedule == plan_updates([20_000] * 12, side.rates)
    assert side.rates.param_bytes == 2


@pytest.mark.parametrize("name", ["shar=0.5", "share=2", "stride=0.5", "share=", "all"])
def test_an_unknown_schedule_is_refused(adamw: Make, parameters: Make, name: str) -> None:
    with pytest.raises(ValueError, match=f"update_schedule='{name}' is not known"):
        adamw(parameters(), update_schedule=name)


def test_states_that_do_not_fit_are_refused_at_once(
    adamw: Make, parameters: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = EmulatedUpdates(EmulatedRates(memory_bytes=10_000))
    with pytest.raises(MemoryError, match=r"device=1.*on the device, where 10000 are"):
        adamw(parameters(), emulated_device=device, placement="device=1")
    adamw(parameters(), emulated_device=device, placement="host").close()
    device.close()
    monkeypatch.setattr(placement, "available_bytes", lambda: 5000)
    with pytest.raises(MemoryError, match=r"bytes of states on the host, where 5000 are available"):
        adamw(parameters())
    adamw(parameters(), placement="ssd")
