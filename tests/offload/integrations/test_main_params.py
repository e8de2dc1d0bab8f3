"""Tests of `MainParamsAdamW`: its states are shown as torch's, and what is changed there stays."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.config import OptimizerConfig
from offload.integrations.main_params import MainParamsAdamW
from offload.native import FaultPlan, FaultRule
from offload.optimizer import AdamW

SIZES = (500_000, 600_000, 300_000)


def made(
    directory: Path, *sizes: int, subgroup_params: int = 7, staging_bytes: int = 1 << 20
) -> tuple[list[torch.Tensor], MainParamsAdamW]:
    """Return parameters and their optimizer, with states on the SSD."""
    torch.manual_seed(0)
    params = [torch.randn(size) for size in sizes]
    config = OptimizerConfig(
        placement="ssd",
        path=(str(directory),),
        subgroup_params=subgroup_params,
        staging_bytes=staging_bytes,
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


def train(params: list[torch.Tensor], optimizer: Any, seeds: range) -> None:
    """Take several."""
    for seed in seeds:
        step(params, optimizer, seed)


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


def test_what_is_changed_unseen_is_taken_over(spill_dir: Path) -> None:
    params, optimizer = made(spill_dir, 5, 11)
    step(params, optimizer, 1)
    # As Megatron's loaders do, which no version counts; and another tensor at an old one's address.
    optimizer.state[params[0]]["exp_avg"].data.copy_(torch.full((5,), 7.0))
    del optimizer.state[params[1]]["exp_avg"]
    optimizer.state[params[1]]["exp_avg"] = torch.full((11,), 7.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param in params:
        assert torch.equal(optimizer.state[param]["exp_avg"], torch.full_like(param, 7 * 0.9))
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


def test_each_parameter_keeps_its_own_count(spill_dir: Path) -> None:
    params, optimizer = made(spill_dir, 5, 11)
    step(params, optimizer, 1)
    params[1].grad = None
    optimizer.step()
    found = optimizer.state_dict()
    assert "step" not in found["param_groups"][0]
    _, fresh = made(spill_dir, 5, 11)
    fresh.load_state_dict(found)
    assert [float(each["step"]) for each in fresh.state_dict()["state"].values()] == [2, 1]
    optimizer.close()
    fresh.close()


LARGE = {"subgroup_params": 100_000, "staging_bytes": 4 << 20}


def failed(
    directory: Path, first: int, patch: pytest.MonkeyPatch
) -> tuple[list[torch.Tensor], MainParamsAdamW, dict[str, Any]] | None:
    """Have write number `first` fail; None where all was noticed when there was no step."""
    rule = FaultRule(op="write", first=first, count=1, action="error", errno=5)

    def failing(self: MainParamsAdamW, groups: Any) -> AdamW:
        settings = {**asdict(self.config), "io_engine": FaultPlan(rules=[rule])}
        return AdamW(groups, skip_nonfinite=False, **settings)

    with patch.context() as patched:
        patched.setattr(MainParamsAdamW, "_made", failing)
        params, optimizer = made(directory, *SIZES, **LARGE)
    step(params, optimizer, 0)
    saved = optimizer.state_dict()
    saved["params"] = [param.clone() for param in params]
    try:
        train(params, optimizer, range(1, 6))
    except OSError:
        return params, optimizer, saved
    optimizer.close()
    return None


@pytest.mark.filterwarnings("ignore:.*stay in memory")
def test_a_checkpoint_leads_on_after_a_write_that_failed(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which write is noticed in the middle of a step depends on how fast the drive is.
    tried = (failed(spill_dir, first, monkeypatch) for first in range(36, 80))
    params, optimizer, saved = next(each for each in tried if each is not None)
    with pytest.raises(RuntimeError, match="resume from a checkpoint"):
        optimizer.state_dict()
    for param, value in zip(params, saved.pop("params"), strict=True):
        param.copy_(value)
    optimizer.load_state_dict(saved)
    train(params, optimizer, range(1, 3))
    others, whole = made(spill_dir, *SIZES, **LARGE)
    train(others, whole, range(3))
    assert all(torch.equal(*pair) for pair in zip(params, others, strict=True))
    optimizer.close()
    whole.close()


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
