"""Steps of `offload.AdamW` that fail midway: nothing is lost, and they can be finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from offload.device.emulated_updates import EmulatedUpdates
from offload.native import FaultPlan, FaultRule
from tests.offload.optimizer.test_adamw import STEPS, require_equal, run, states_of
from tests.offload.optimizer.test_gradients import backward, require_same, trained

Make = Callable[..., Any]


def fault(op: str, first: int, **how: Any) -> FaultPlan:
    return FaultPlan(rules=[FaultRule(op=op, first=first, count=1, **how)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 3, 11, 25])
def test_a_read_that_fails_once_leaves_a_step_that_can_be_finished(
    adamw: Make, parameters: Make, give_grads: Make, dtype: torch.dtype, first: int
) -> None:
    params, others = parameters(dtype), parameters(dtype)
    optimizer = adamw(params, placement="ssd", io_engine=fault("read", first))
    other = adamw(others)
    said = []
    for step in range(STEPS):
        give_grads(params, step)
        give_grads(others, step)
        other.step()
        try:
            optimizer.step()
        except OSError as error:
            said.append(str(error))
            with pytest.raises(RuntimeError, match="half done"):
                optimizer.state_dict()
            optimizer.step()
    assert len(said) == 1
    assert "step() again to finish" in said[0]
    assert all(map(torch.equal, params, others))
    require_equal(states_of(optimizer), states_of(other))


def test_a_changed_gradient_cannot_finish_a_step(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params = parameters()
    optimizer = adamw(params, placement="ssd", io_engine=fault("read", 2))
    with pytest.raises(OSError, match="of 10 subgroups are updated"):
        run(optimizer, params, give_grads, range(3))
    params[0].grad.mul_(2)
    with pytest.raises(RuntimeError, match="has changed since a step failed"):
        optimizer.step()


def test_a_changed_byte_on_the_drive_is_an_error_and_no_wrong_number(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params = parameters()
    optimizer = adamw(params, placement="ssd", io_engine=fault("read", 3, action="corrupt"))
    run(optimizer, params, give_grads, range(1))
    with pytest.raises(OSError, match="other bytes than were written"):
        run(optimizer, params, give_grads, range(1, 3))


def test_a_drive_that_is_full_keeps_states_in_memory_with_the_same_bits(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    full = FaultPlan(rules=[FaultRule(op="write", first=4, count=9, action="error", errno=28)])
    params, others = parameters(), parameters()
    optimizer = adamw(params, placement="ssd", io_engine=full)
    run(optimizer, params, give_grads, range(STEPS))
    run(adamw(others), others, give_grads, range(STEPS))
    assert optimizer._placement._tier.kept_total_bytes() > 0
    assert all(map(torch.equal, params, others))


@pytest.mark.filterwarnings("ignore:.*stay in memory, since their write failed")
def test_a_failed_write_loses_nothing_whenever_it_is_noticed(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params, others = parameters(), parameters()
    optimizer, other = adamw(params, placement="ssd", io_engine=fault("write", 4)), adamw(others)
    before: list[torch.Tensor] = []

    def train() -> None:
        for step in range(3):
            before[:] = [param.detach().clone() for param in others]
            run(other, others, give_grads, range(step, step + 1))
            run(optimizer, params, give_grads, range(step, step + 1))

    with pytest.raises(OSError, match=r"of 10 subgroups are updated"):
        train()
    done = optimizer._unfinished.done
    assert len(done) < 10
    for number, (subgroup, _) in enumerate(optimizer._subgroups):
        for piece in subgroup.pieces:
            place = next(at for at, param in enumerate(params) if param is piece.param)
            expected = others[place] if number in done else before[place]
            assert torch.equal(piece.of(piece.param), piece.of(expected))


@pytest.mark.parametrize("with_device", [False, True])
def test_a_backward_cannot_mix_with_the_gradients_of_a_failed_step(
    adamw: Make, parameters: Make, device: EmulatedUpdates, with_device: bool
) -> None:
    params, others = parameters(), parameters()
    optimizer = adamw(
        params,
        placement="ssd",
        early_gradients=True,
        emulated_device=device if with_device else None,
        io_engine=FaultPlan(rules=[FaultRule(op="read", first=5, count=1, action="error")]),
    )
    other = adamw(others)
    failed = 0
    for step in range(4):
        backward(params, step)
        backward(others, step)
        other.step()
        other.zero_grad()
        try:
            optimizer.step()
        except OSError:
            failed += 1
            with pytest.raises(RuntimeError, match="call step\\(\\) again"):
                backward(params, 77)
            assert all(param.grad is None for param in params)
            optimizer.step(lambda: pytest.fail("a step that is finished needs no closure"))
        optimizer.zero_grad()
    assert failed == 1
    assert all(map(torch.equal, params, others))


@pytest.mark.parametrize("with_device", [False, True])
def test_a_step_that_cannot_begin_keeps_the_gradients(
    adamw: Make, parameters: Make, device: EmulatedUpdates, with_device: bool
) -> None:
    beside = {"emulated_device": device, "update_schedule": "host"} if with_device else {}
    params, others = parameters(), parameters()
    optimizer, other = adamw(params, early_gradients=True, **beside), adamw(others)
    trained(optimizer, params, steps=1)
    trained(other, others, steps=1)
    backward(params, 9)
    backward(others, 9)
    lr, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], "fast"
    with pytest.raises(ValueError, match="fast"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    other.step()
    other.zero_grad()
    require_same(trained(optimizer, params, steps=2), trained(other, others, steps=2))


def test_parts_without_gradients_take_no_staging_from_others(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params, others = parameters(), parameters()
    optimizer, other = adamw(params, placement="ssd"), adamw(others)
    for trains in (range(5), range(5), range(5, 9), range(5, 9), range(4, 6), range(9)):
        for mine, step in ((params, optimizer.step), (others, other.step)):
            give_grads(mine, 1)
            for number, param in enumerate(mine):
                if number not in trains:
                    param.grad = None
            step()
        optimizer.state_dict()
    assert all(map(torch.equal, params, others))
    counters = optimizer._placement.counters()
    assert counters["native_peak_bytes"] <= optimizer.config.staging_bytes


def test_larger_subgroups_that_come_later_find_room(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    results = []
    for placement in ("ssd", "host"):
        params, more = parameters(), parameters(torch.bfloat16, seed=1)
        optimizer = adamw(params, placement=placement)
        run(optimizer, params, give_grads, range(3))
        optimizer.add_param_group({"params": more})  # with a master copy each
        results.append(run(optimizer, [*params, *more], give_grads, range(3, 9)))
    assert all(map(torch.equal, *results))


def test_a_step_that_has_changed_nothing_keeps_nobody_from_saving(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params, others = parameters(), parameters()
    counted = parameters()
    whole = adamw(counted, placement="ssd")
    run(whole, counted, give_grads, range(1))
    written = int(whole._placement.counters()["write_bytes"])
    optimizer = adamw(params, placement="ssd", ssd_write_bytes_per_day=24 * (written + 1))
    other = adamw(others)
    run(optimizer, params, give_grads, range(1))
    run(other, others, give_grads, range(1))
    give_grads(params, 1)
    with pytest.raises(OSError, match=r"ssd_write_bytes_per_day.*; 0 of 10 subgroups"):
        optimizer.step()
    require_equal(states_of(optimizer), states_of(other))


def test_saving_does_not_cost_a_step_the_gradients_that_it_took(
    adamw: Make, parameters: Make
) -> None:
    counted, params = parameters(), parameters()
    whole = adamw(counted, placement="ssd")
    trained(whole, counted, steps=1)
    written = int(whole._placement.counters()["write_bytes"])
    optimizer = adamw(
        params, placement="ssd", early_gradients=True, ssd_write_bytes_per_day=24 * (written + 1)
    )
    backward(params, 0)
    optimizer.step()
    backward(params, 1)
    for _ in range(2):  # the step is still there to be finished, gradients and all
        with pytest.raises(OSError, match="0 of 10 subgroups"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="half done"):
            optimizer.state_dict()


def test_a_checkpoint_takes_the_place_of_a_step_half_done(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params, others = parameters(), parameters()
    optimizer, other = adamw(params, placement="ssd", io_engine=fault("read", 4)), adamw(others)
    with pytest.raises(OSError, match="subgroups are updated"):
        run(optimizer, params, give_grads, range(3))
    run(other, others, give_grads, range(2))
    with torch.no_grad():
        for mine, theirs in zip(params, others, strict=True):
            mine.copy_(theirs)
    optimizer.load_state_dict(other.state_dict())
    found, expected = (
        run(each, mine, give_grads, range(2, 5))
        for each, mine in ((optimizer, params), (other, others))
    )
    assert all(map(torch.equal, found, expected))
    require_equal(states_of(optimizer), states_of(other))


@pytest.mark.parametrize("change", [lambda t: t.to(torch.bfloat16), lambda t: t.reshape(-1)[:-1]])
def test_a_parameter_that_became_another_is_refused_before_anything_is_changed(
    adamw: Make, parameters: Make, give_grads: Make, change: Callable[..., Any]
) -> None:
    params = parameters()
    optimizer = adamw(params)
    run(optimizer, params, give_grads, range(2))
    before = [param.detach().clone() for param in params]
    states = states_of(optimizer)
    params[-1].data = change(params[-1].data)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="when its AdamW was made is now"):
        optimizer.step()
    assert all(map(torch.equal, params[:-1], before[:-1]))
    params[-1].data = before[-1].clone()
    require_equal(states_of(optimizer), states)
    run(optimizer, params, give_grads, range(2, 3))
    assert not torch.equal(params[-1], before[-1])
