"""What cannot work beside a plan is refused before anything is built, with what to remove."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.optimizer import OptimizerConfig

from offload.integrations import megatron
from offload.integrations.main_params import MainParamsAdamW


def model(**config: Any) -> torch.nn.Module:
    """Return a module with a configuration."""
    found = torch.nn.Linear(2, 2)
    found.config = SimpleNamespace(**config)  # type: ignore[assignment]
    return found


def moved(directory: Path) -> dict[str, Any]:
    """Return a plan that moves activations."""
    return {"version": 1, "activations": {"mode": "ssd", "path": [str(directory)]}}


STATES = {"version": 1, "optimizer": {"placement": "host"}}


@pytest.mark.parametrize("key", ["fine_grained_activation_offloading", "cpu_offloading"])
def test_megatrons_own_offloading_of_activations_is_refused(key: str, spill_dir: Path) -> None:
    with pytest.raises(ValueError, match=f"{key}=True and the plan both move"):
        megatron.wrap_model(model(**{key: True}), moved(spill_dir))


def test_passes_that_run_behind_the_forward_step_are_refused(spill_dir: Path) -> None:
    with pytest.raises(ValueError, match="overlap_moe_expert_parallel_comm=True"):
        megatron.wrap_model(model(overlap_moe_expert_parallel_comm=True), moved(spill_dir))


def test_a_forward_step_is_wrapped_once() -> None:
    wrapped = megatron.wrap_forward_step(lambda data, model: None)
    with pytest.raises(ValueError, match="wrapped already"):
        megatron.wrap_forward_step(wrapped)


def test_a_forward_outside_of_the_wrapped_step_is_told_of_once(spill_dir: Path) -> None:
    chunk = megatron.wrap_model(model(), moved(spill_dir))
    with pytest.warns(RuntimeWarning, match="outside of wrap_forward_step"):
        chunk(torch.ones(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunk(torch.ones(1, 2))
    session = megatron.session_of(chunk)
    assert session is not None
    session.close()


def test_a_model_is_wrapped_once(spill_dir: Path) -> None:
    chunk = megatron.wrap_model(model(), moved(spill_dir))
    with pytest.raises(ValueError, match="wrapped already"):
        megatron.wrap_model(chunk, moved(spill_dir))
    session = megatron.session_of(chunk)
    assert session is not None
    session.close()
    again = megatron.session_of(megatron.wrap_model(chunk, moved(spill_dir)))
    assert again is not session
    assert again is not None
    again.close()


@pytest.mark.parametrize(
    "activations", [{"mode": "recompute"}, {"mode": "recompute", "recompute": [0]}]
)
def test_a_plan_that_runs_layers_again_is_refused(activations: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--recompute-granularity full"):
        megatron.wrap_model(model(), {"version": 1, "activations": activations})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optimizer": "sgd"}, "is not AdamW"),
        ({"optimizer": "adam", "decoupled_weight_decay": False}, "is not AdamW"),
        ({"optimizer": "adam", "optimizer_cpu_offload": True}, "optimizer_cpu_offload"),
        ({"optimizer": "adam", "use_precision_aware_optimizer": True}, "precision_aware"),
    ],
)
def test_another_optimizer_is_refused(
    settings: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "get_megatron_optimizer", _never)
    config = SimpleNamespace(**{"decoupled_weight_decay": True, **settings})
    with pytest.raises(ValueError, match=named):
        megatron.build_optimizer(config, [model()], STATES)


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("built before it was refused")


def test_megatrons_fsdp_is_refused_with_states() -> None:
    chunk = model()
    chunk.ddp_config = SimpleNamespace(use_megatron_fsdp=True)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="use_megatron_fsdp=True"):
        megatron.build_optimizer(OptimizerConfig(optimizer="adam"), [chunk], STATES)


def test_a_fused_adams_groups_are_taken_as_they_are() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    group = {"params": [parameter], "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    group |= {"weight_decay": 0.1, "bias_correction": True, "wd_mult": 1.0}
    defaults = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    fused = SimpleNamespace(state={}, defaults=defaults, param_groups=[group])
    built = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=fused)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron, "get_megatron_optimizer", lambda *_, **__: built)
        megatron.build_optimizer(OptimizerConfig(optimizer="adam"), [model()], STATES)
    [ours] = (each.optimizer for each in built.chained_optimizers)
    assert isinstance(ours, MainParamsAdamW)
    assert ours.param_groups[0]["wd_mult"] == 1.0
    parameter.grad = torch.ones(3)
    ours.step()
    assert torch.equal(parameter.detach(), parameter.detach()[:1].expand(3))
    assert (parameter < 1).all()
    megatron.close_optimizer(built)


def test_the_arguments_are_one_group() -> None:
    parser = megatron.add_arguments(argparse.ArgumentParser())
    assert parser.parse_args(["--offload-plan", "plan.json"]).offload_plan == "plan.json"
    assert parser.parse_args([]).offload_plan is None
