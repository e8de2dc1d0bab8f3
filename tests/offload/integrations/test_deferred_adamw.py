"""AdamW of tensors that a framework puts in the place of parameters, some after the others."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload.config import OptimizerConfig
from offload.device.emulated_updates import EmulatedUpdates
from offload.integrations.deferred_adamw import DeferredAdamW

SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


def tensors(seed: int = 0) -> list[torch.nn.Parameter]:
    """Return three parameters of other sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (700, 1300, 40)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """Set gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


@pytest.fixture(params=["device", "ssd", "host=0.5,ssd=0.5"])
def deferred(request: pytest.FixtureRequest, spill_dir: Path) -> Iterator[DeferredAdamW]:
    """One that was made for other tensors than it is to train."""
    path = (str(spill_dir),) if "ssd" in request.param else ()
    config = OptimizerConfig(
        placement=request.param, path=path, subgroup_params=500, staging_bytes=1 << 20
    )
    optimizer = DeferredAdamW([torch.nn.Parameter(torch.zeros(9))], config, **SETTINGS)
    yield optimizer
    optimizer.close()


def test_tensors_shown_one_after_the_other_have_the_bits_of_one_step(
    deferred: DeferredAdamW,
) -> None:
    mine, others = tensors(), tensors()
    plain = offload.AdamW(others, **SETTINGS)
    for step in range(3):
        give_gradients(mine, step)
        give_gradients(others, step)
        plain.step()
        for param in mine:  # as ZeRO-3 does, while the others have gradients too
            deferred.param_groups[0]["params"] = [param]
            deferred.step()
            deferred.param_groups[0]["params"] = []
    assert all(torch.equal(one, other) for one, other in zip(mine, others, strict=True))
    assert {int(deferred.state[param]["step"]) for param in mine} == {3}


def test_settings_of_the_group_that_is_shown_hold(deferred: DeferredAdamW) -> None:
    mine, others = tensors(), tensors()
    plain = offload.AdamW(others, **SETTINGS)
    deferred.param_groups[0]["params"] = mine
    for step, lr in itertools.product(range(2), (1e-3, 5e-3)):
        for optimizer, params in ((deferred, mine), (plain, others)):
            give_gradients(params, step)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(mine, others, strict=True))


def test_a_checkpoint_goes_both_ways_with_torchs(deferred: DeferredAdamW) -> None:
    mine, others = tensors(), tensors()
    deferred.param_groups[0]["params"] = mine
    plain = torch.optim.AdamW(others, **SETTINGS, fused=True)
    for step in range(2):
        for optimizer, params in ((deferred, mine), (plain, others)):
            give_gradients(params, step)
            optimizer.step()
    saved = deferred.state_dict()
    for number, state in plain.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(saved["state"][number][name], state[name])
    assert all(set(state) == {"step"} for state in deferred.state.values())
    plain.load_state_dict(saved)
    deferred.load_state_dict(plain.state_dict())
    after = deferred.state_dict()
    for number, state in saved["state"].items():
        assert torch.equal(after["state"][number]["exp_avg"], state["exp_avg"])


def test_states_that_a_framework_puts_there_itself_are_taken_over(deferred: DeferredAdamW) -> None:
    [first, *rest] = tensors()
    deferred.param_groups[0]["params"] = [first, *rest]
    give_gradients([first, *rest], 0)
    deferred.step()
    before = deferred.state_dict()["state"]
    moment = torch.full_like(first, 0.5)
    deferred.state[first].update(exp_avg=moment, exp_avg_sq=moment.clone(), step=torch.tensor(7.0))
    give_gradients([first], 1)
    for param in rest:
        param.grad = None
    deferred.step()
    after = deferred.state_dict()["state"]
    assert float(after[0]["step"]) == 8
    expected = 0.9 * moment + 0.1 * first.grad  # type: ignore[operator]
    assert torch.allclose(after[0]["exp_avg"], expected)
    assert torch.equal(after[1]["exp_avg"], before[1]["exp_avg"])


def test_a_gradient_that_is_not_finite_is_the_frameworks_to_skip(deferred: DeferredAdamW) -> None:
    mine = tensors()
    deferred.param_groups[0]["params"] = mine
    give_gradients(mine, 0)
    mine[1].grad[3] = torch.inf  # type: ignore[index]
    deferred.step()
    assert int(deferred.state[mine[0]]["step"]) == 1
    assert not mine[1][3].isfinite()


def test_what_adamw_does_not_offer_is_refused(deferred: DeferredAdamW, spill_dir: Path) -> None:
    deferred.param_groups[0] |= {"params": tensors(), "amsgrad": True}
    give_gradients(deferred.param_groups[0]["params"], 0)
    with pytest.raises(ValueError, match="amsgrad=True is not offered"):
        deferred.step()
    with pytest.raises(ValueError, match="lr=-1 is not at least 0"):
        DeferredAdamW(tensors(), OptimizerConfig(placement="device"), lr=-1)
    with pytest.raises(ValueError, match="the checkpoint has groups of"):
        deferred.load_state_dict({"param_groups": [], "state": {}})


def test_a_device_that_is_lent_updates_its_share_with_the_same_bits() -> None:
    device = EmulatedUpdates()
    config = OptimizerConfig(placement="host", subgroup_params=100, update_schedule="share=0.5")
    deferred = DeferredAdamW([torch.nn.Parameter(torch.zeros(9))], config, **SETTINGS)
    deferred.lent_device = device
    mine, others = tensors(), tensors()
    plain = offload.AdamW(others, **SETTINGS)
    for step in range(3):
        give_gradients(mine, step)
        give_gradients(others, step)
        plain.step()
        for param in mine:
            deferred.param_groups[0]["params"] = [param]
            deferred.step()
    assert device.done()["states in"][0] > 0
    assert all(torch.equal(one, other) for one, other in zip(mine, others, strict=True))
    deferred.close()
    device.close()


def test_after_a_step_that_failed_midway_only_a_checkpoint_leads_on(
    deferred: DeferredAdamW, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tensors()
    deferred.param_groups[0]["params"] = params
    give_gradients(params, 0)
    deferred.step()
    checkpoint = deferred.state_dict()

    def failing(self: offload.AdamW, some: Any, settle: bool) -> None:
        raise OSError(errno.EIO, "a block is bad", "/nvme")

    with monkeypatch.context() as patch:
        patch.setattr(offload.AdamW, "step_of", failing)
        with pytest.raises(OSError, match="a block is bad; the step is half done"):
            deferred.step()
    with pytest.raises(RuntimeError, match="load a checkpoint first"):
        deferred.step()
    deferred.load_state_dict(checkpoint)
    deferred.step()


def test_steps_that_only_a_groups_last_parameter_counts_are_those_of_all() -> None:
    config = OptimizerConfig(placement="device")
    mine, others = tensors(), tensors()
    one, other = (DeferredAdamW(each, config, **SETTINGS) for each in (mine, others))
    for step in range(3):
        for params, optimizer in ((mine, one), (others, other)):
            give_gradients(params, step)
            optimizer.step()
    checkpoint = one.state_dict()
    assert checkpoint["param_groups"][0]["bias_correction"] is True
    for number in (0, 1):  # as DeepSpeed's FusedAdam leaves them
        checkpoint["state"][number] = {**checkpoint["state"][number], "step": 0}
    one.load_state_dict(checkpoint)
    for params, optimizer in ((mine, one), (others, other)):
        give_gradients(params, 3)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
    one.close()
    other.close()


def test_who_reaches_into_states_is_told_where_they_are(deferred: DeferredAdamW) -> None:
    params = tensors()
    deferred.param_groups[0]["params"] = params
    for again in (False, True):
        give_gradients(params, 0)
        deferred.step()
        if again:
            deferred.load_state_dict(deferred.state_dict())
        for param in params:
            assert set(deferred.state[param]) == {"step"}
            with pytest.raises(KeyError, match=r"exp_avg is where the plan's optimizer has it.*"):
                deferred.state[param]["exp_avg"]
