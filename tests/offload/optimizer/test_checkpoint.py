"""Checkpoints of `offload.AdamW`: to any placement, to `torch.optim.AdamW`, and back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.offload.optimizer.test_adamw import PLACEMENTS, require_equal, run, states_of

Make = Callable[..., Any]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", PLACEMENTS)
@pytest.mark.parametrize("second", PLACEMENTS)
def test_a_checkpoint_goes_on_at_another_placement_to_the_same_bits(
    adamw: Make, parameters: Make, give_grads: Make, dtype: torch.dtype, first: str, second: str
) -> None:
    params, others = parameters(dtype), parameters(dtype)
    optimizer, whole = adamw(params, placement=first), adamw(others)
    run(optimizer, params, give_grads, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = adamw(params, 7.0, placement=second, subgroup_params=77, staging_bytes=1 << 22)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == 1e-3
    run(resumed, params, give_grads, range(3, 6))
    run(whole, others, give_grads, range(6))
    assert all(map(torch.equal, params, others))
    require_equal(states_of(resumed), states_of(whole))


def test_checkpoints_go_to_torchs_adamw_and_back(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params, others = parameters(), parameters()
    mine, torchs = adamw(params), torch.optim.AdamW(others, fused=True)
    run(mine, params, give_grads, range(2))
    torchs.load_state_dict(mine.state_dict())
    with torch.no_grad():
        for other, param in zip(others, params, strict=True):
            other.copy_(param)
    run(torchs, others, give_grads, range(2, 4))
    back = adamw(others, placement="ssd")
    back.load_state_dict(torchs.state_dict())
    run(back, others, give_grads, range(4, 6))
    run(mine, params, give_grads, range(2, 6))
    for one, other in zip(params, others, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7), "but for the tails of vectors"


def test_a_checkpoint_without_master_copies_is_taken_and_that_is_said(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params = parameters(torch.bfloat16)
    torchs = torch.optim.AdamW(params, fused=True)
    run(torchs, params, give_grads, range(2))
    optimizer = adamw(params)
    with pytest.warns(UserWarning, match="no master_param for 9 parameters"):
        optimizer.load_state_dict(torchs.state_dict())
    run(optimizer, params, give_grads, range(2, 3))
    states = states_of(optimizer)
    assert all(state["step"] == 3 for state in states.values())
    assert all(state["exp_avg"].dtype == torch.float32 for state in states.values())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda saved: saved["state"][1].update(exp_avg=torch.zeros(3)), "exp_avg 1 .* shape"),
        (lambda saved: saved["state"][2].pop("exp_avg_sq"), "no 'exp_avg_sq'"),
        (lambda saved: saved["param_groups"][0].update(amsgrad=True), "amsgrad=True"),
        (lambda saved: saved["param_groups"][0].update(decoupled_weight_decay=False), "Adam's"),
        (lambda saved: saved["param_groups"][0]["params"].pop(), "8 parameters, but there are 9"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(
    adamw: Make, parameters: Make, give_grads: Make, spoil: Any, said: str
) -> None:
    params = parameters()
    optimizer = adamw(params)
    run(optimizer, params, give_grads, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    spoil(wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=said):
            optimizer.load_state_dict(wrong)
    require_equal(states_of(optimizer), before["state"])


def test_a_models_parameters_may_be_loaded_after_its_optimizers_states(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params, whole = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizer, other = adamw(params), adamw(whole)
    run(optimizer, params, give_grads, range(3))
    saved, values = (
        copy.deepcopy(optimizer.state_dict()),
        [param.detach().clone() for param in params],
    )
    fresh = parameters(torch.bfloat16, seed=1)
    resumed = adamw(fresh)
    resumed.load_state_dict(saved)
    with torch.no_grad():
        for param, value in zip(fresh, values, strict=True):
            param.copy_(value)
    run(resumed, fresh, give_grads, range(3, 6))
    run(other, whole, give_grads, range(6))
    require_equal(states_of(resumed), states_of(other))
    assert all(map(torch.equal, fresh, whole))


def test_an_older_checkpoint_with_other_names_and_fewer_keys_is_taken(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params, others = parameters(), parameters()
    optimizer, whole = adamw(params), adamw(others)
    run(optimizer, params, give_grads, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["params"] = [f"weight {number}" for number in group["params"]]
        for key in ("maximize", "decoupled_weight_decay", "foreach"):
            del group[key]
    saved["state"] = {f"weight {number}": states for number, states in saved["state"].items()}
    resumed = adamw(params)
    resumed.load_state_dict(saved)
    run(resumed, params, give_grads, range(2, 4))
    run(whole, others, give_grads, range(4))
    require_equal(states_of(resumed), states_of(whole))


def test_a_parameter_without_elements_goes_there_and_back(adamw: Make) -> None:
    params = [torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = adamw(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["state"][0]["exp_avg"].shape == (0, 3)
    adamw(params).load_state_dict(saved)
    torch.optim.AdamW(params).load_state_dict(saved)


def test_a_checkpoint_that_was_loaded_in_part_is_not_trained_on(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params = parameters()
    optimizer = adamw(params)
    run(optimizer, params, give_grads, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    broken = adamw(params, placement="ssd")
    tier = broken._placement._tier
    stage, calls = tier.stage, iter(range(3))
    tier.stage = lambda *args: stage(*args) if next(calls, None) is not None else None
    with pytest.raises(OSError, match="spill_bytes"):
        broken.load_state_dict(saved)
    before = [param.detach().clone() for param in params]
    for use in (broken.step, broken.state_dict):
        with pytest.raises(RuntimeError, match="loaded in part"):
            use()
    assert all(map(torch.equal, params, before))
    tier.stage = stage
    broken.load_state_dict(saved)
    require_equal(states_of(broken), saved["state"])


@pytest.mark.parametrize("model_first", [False, True])
def test_what_torch_has_trained_on_is_not_undone(
    adamw: Make, parameters: Make, give_grads: Make, model_first: bool
) -> None:
    params = parameters(torch.bfloat16)
    first = adamw(params, lr=0.1)
    run(first, params, give_grads, range(2))
    torchs = torch.optim.AdamW(params, lr=0.1)  # carries the master copies along, unchanged
    torchs.load_state_dict(first.state_dict())
    weights = run(torchs, params, give_grads, range(2, 5))
    there = parameters(torch.bfloat16)
    second = adamw(there, lr=0.1)

    def load_model() -> None:
        with torch.no_grad():
            for param, weight in zip(there, weights, strict=True):
                param.copy_(weight)

    if model_first:
        load_model()
    second.load_state_dict(torchs.state_dict())
    if not model_first:
        load_model()
    second.param_groups[0]["lr"] = 0.0
    run(second, there, give_grads, range(5, 6))
    assert all(map(torch.equal, there, weights))


@pytest.mark.parametrize("wrong", [{}, {"model": {}}, {"param_groups": []}])
def test_what_is_no_optimizers_checkpoint_is_refused_by_name(
    adamw: Make, parameters: Make, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"the checkpoint has no '(param_groups|state)'"):
        adamw(parameters()).load_state_dict(wrong)
