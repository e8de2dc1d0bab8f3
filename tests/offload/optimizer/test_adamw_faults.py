"""Steps of `offload.AdamW` that fail midway: nothing is lost, and they can be finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from offload.native import FaultPlan, FaultRule
from tests.offload.optimizer.test_adamw import STEPS, require_equal, run, states_of

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
