"""Tests of `MainParamsAdamW`: its states are shown as torch's, and what is changed there stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload.config import OptimizerConfig
from offload.integrations.main_params import MainParamsAdamW


def made(directory: Path, *sizes: int) -> tuple[list[torch.Tensor], MainParamsAdamW]:
    """Return parameters and their optimizer, with states on the SSD."""
    torch.manual_seed(0)
    params = [torch.randn(size) for size in sizes]
    config = OptimizerConfig(
        placement="ssd", path=(str(directory),), subgroup_params=7, staging_bytes=1 << 20
    )
    optimizer = MainParamsAdamW([{"params": params}], config, lr=0.1)
    optimizer.prepare((group, group["params"]) for group in optimizer.param_groups)
    return params, optimizer


def step(params: list[torch.Tensor], optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Take one with gradients of its own."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def test_states_are_shown_as_torch_has_them(spill_dir: Path) -> None:
    params, optimizer = made(spill_dir, 5, 11)
    torch.manual_seed(0)
    others = [torch.randn(size) for size in (5, 11)]
    own = torch.optim.AdamW(others, lr=0.1, fused=True)
    assert len(optimizer.state) == 2
    assert all(not states["exp_avg"].any() for states in optimizer.state.values())
    for seed in range(3):
        step(params, optimizer, seed)
        step(others, own, seed)
        for ours, theirs in zip(params, others, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.allclose(optimizer.state[ours][name], own.state[theirs][name])
    optimizer.close()


def test_looking_changes_nothing(spill_dir: Path) -> None:
    seen_params, seen = made(spill_dir, 5, 11)
    params, optimizer = made(spill_dir, 5, 11)
    for seed in range(3):
        step(seen_params, seen, seed)
        step(params, optimizer, seed)
        assert seen.state[seen_params[0]]["exp_avg"].any()
        seen.state_dict()
    for ours, theirs in zip(params, seen_params, strict=True):
        assert torch.equal(ours, theirs)
    seen.close()
    optimizer.close()


def test_what_is_changed_in_place_is_taken_over(spill_dir: Path) -> None:
    params, optimizer = made(spill_dir, 5, 11)
    step(params, optimizer, 1)
    saved = [
        {name: value.clone() for name, value in optimizer.state[param].items()} for param in params
    ]
    step(params, optimizer, 2)
    for param, states in zip(params, saved, strict=True):
        for name, value in states.items():
            optimizer.state[param][name].copy_(value)
    found = optimizer.state_dict()["state"]
    for number, states in enumerate(saved):
        assert torch.equal(found[number]["exp_avg"], states["exp_avg"])
        assert float(found[number]["step"]) == 2
    step(params, optimizer, 3)  # lets go of what was shown
    assert float(optimizer.state_dict()["state"][0]["step"]) == 3
    optimizer.close()


@pytest.mark.parametrize("per_group", [True, False])
def test_steps_are_counted_by_group_and_by_parameter(spill_dir: Path, per_group: bool) -> None:
    params, optimizer = made(spill_dir, 5, 11)
    for seed in range(4):
        step(params, optimizer, seed)
    found = optimizer.state_dict()
    if per_group:  # a fused Adam's
        for states in found["state"].values():
            del states["step"]
    else:  # torch's
        for group in found["param_groups"]:
            assert group.pop("step") == 4
    fresh_params, fresh = made(spill_dir, 5, 11)
    for mine, other in zip(fresh_params, params, strict=True):
        mine.copy_(other)
    fresh.load_state_dict(found)
    assert "step" not in fresh.param_groups[0]
    step(params, optimizer, 9)
    step(fresh_params, fresh, 9)
    for mine, other in zip(fresh_params, params, strict=True):
        assert torch.equal(mine, other)
    optimizer.close()
    fresh.close()
