"""`offload.AdamW` beside `torch.optim.AdamW`: the same bits, wherever the states are."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import offload
from offload.native import adam_path

PLACEMENTS = ("host", "device", "ssd", "host=0.4,ssd=0.6")
HALVES = (torch.bfloat16, torch.float16)
STEPS = 7
Make = Callable[..., Any]


def states_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, torch.Tensor]]:
    return optimizer.state_dict()["state"]


def require_equal(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for number, states in one.items():
        assert states.keys() == other[number].keys()
        for name, value in states.items():
            assert torch.equal(value, other[number][name]), (number, name)


def run(
    optimizer: Any, params: list[torch.nn.Parameter], give_grads: Make, steps: range
) -> list[torch.Tensor]:
    for step in steps:
        give_grads(params, step)
        optimizer.step()
    return [param.detach().clone() for param in params]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(adam_path() == "scalar", reason="torch's vector loop is the definition")
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("maximize", [False, True])
def test_fp32_has_the_bits_of_torchs_fused_adamw(
    adamw: Make, parameters: Make, give_grads: Make, placement: str, maximize: bool
) -> None:
    # Whole vectors of any processor: in its tails torch's own arithmetic is another one.
    ours, theirs = ([param for param in parameters() if not param.numel() % 64] for _ in range(2))
    assert len(ours) >= 2
    settings: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "maximize": maximize}
    mine = adamw(ours, placement=placement, **settings)
    torchs = torch.optim.AdamW(theirs, fused=True, **settings)
    got, wanted = (
        run(optimizer, params, give_grads, range(STEPS))
        for optimizer, params in ((mine, ours), (torchs, theirs))
    )
    assert all(map(torch.equal, got, wanted))
    require_equal(states_of(mine), states_of(torchs))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_where_the_states_lie_and_how_they_are_cut_changes_no_bit(
    adamw: Make, parameters: Make, give_grads: Make, dtype: torch.dtype, max_norm: float | None
) -> None:
    found = []
    for placement in PLACEMENTS:
        for subgroup_params in (1, 97, 1000, 1 << 20):
            if subgroup_params == 1 and placement != "host":
                continue  # thousands of files' blocks
            params = parameters(dtype)
            optimizer = adamw(
                params,
                placement=placement,
                subgroup_params=subgroup_params,
                max_norm=max_norm,
                staging_bytes=1 << 24,
                threads=1 + len(found) % 2,
            )
            weights = run(optimizer, params, give_grads, range(3))
            found.append((weights, states_of(optimizer), optimizer.total_norm))
            optimizer.close()
    for weights, states, norm in found[1:]:
        assert all(map(torch.equal, weights, found[0][0]))
        require_equal(states, found[0][1])
        assert norm == found[0][2]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_parameter_of_lower_precision_is_its_rounded_master_copy(
    adamw: Make, parameters: Make, give_grads: Make, dtype: torch.dtype
) -> None:
    params = parameters(dtype)
    masters = [torch.nn.Parameter(param.detach().float()) for param in params]
    low, high = adamw(params, 1e-4), adamw(masters, 1e-4)
    for step in range(STEPS):
        give_grads(params, step)
        for param, master in zip(params, masters, strict=True):
            assert param.grad is not None
            master.grad = param.grad.float()
        low.step()
        high.step()
    for number, (param, master) in enumerate(zip(params, masters, strict=True)):
        assert torch.equal(states_of(low)[number]["master_param"], master)
        assert torch.equal(param, master.to(dtype))


def test_clipping_is_torchs_but_for_the_precision_of_the_norm(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    ours, theirs = parameters(), parameters()
    mine, plain = adamw(ours, max_norm=1.5), adamw(theirs)
    for step in range(3):
        give_grads(ours, step)
        give_grads(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.5)
        mine.step()
        plain.step()
        assert mine.total_norm == pytest.approx(norm.item(), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("placement", ["host", "ssd"])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(
    adamw: Make, parameters: Make, give_grads: Make, wrong: float, placement: str
) -> None:
    params, others = parameters(), parameters()
    optimizer, other = adamw(params, placement=placement), adamw(others)
    for step in range(4):
        give_grads(params, step)
        if step == 2:
            params[4].grad[17, 3] = wrong
            optimizer.step()
            continue
        optimizer.step()
        give_grads(others, step)
        other.step()
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, params, others))
    require_equal(states_of(optimizer), states_of(other))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_groups_schedulers_missing_gradients_and_closures_are_torchs(
    adamw: Make, parameters: Make, give_grads: Make, placement: str
) -> None:
    found = []
    for make in (adamw, torch.optim.AdamW):
        params = parameters()
        groups = [{"params": params[:3], "lr": 0.1}, {"params": params[3:6], "weight_decay": 0.0}]
        extra = {"placement": placement} if make is adamw else {"fused": True}
        optimizer = make(groups, **extra)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        losses = []
        for step in range(5):
            if step == 2:
                optimizer.add_param_group({"params": params[6:], "betas": (0.5, 0.6)})
            give_grads(params, step)
            params[4].grad = None if step % 2 else params[4].grad
            params[5].requires_grad_(False)
            params[5].grad = None
            losses.append(optimizer.step(lambda: torch.tensor(1.0)))
            scheduler.step()
        optimizer.zero_grad()
        assert all(param.grad is None for param in params)
        assert losses == [torch.tensor(1.0)] * 5
        found.append((params, optimizer.state_dict()))
    (ours, mine), (theirs, torchs) = found
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7), "but for the tails of vectors"
    assert mine["state"].keys() == torchs["state"].keys()
    assert [states["step"] for states in mine["state"].values()] == [
        states["step"] for states in torchs["state"].values()
    ]
    for one, other in zip(mine["param_groups"], torchs["param_groups"], strict=True):
        assert one | {"fused": True} == other


def test_memory_order_does_not_matter_and_gaps_are_refused(adamw: Make) -> None:
    found = []
    for dense in (False, True):
        values = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        if dense:
            values = values.to(memory_format=torch.channels_last)
        param = torch.nn.Parameter(values)
        optimizer = adamw([param])
        for step in range(3):
            param.grad = torch.full(values.shape, 0.1 * step) * torch.arange(8)
            optimizer.step()
        states = states_of(optimizer)[0]
        assert states["exp_avg"].stride() == param.stride()
        found.append((param.detach(), states["exp_avg"]))
    assert all(map(torch.equal, *found))
    with pytest.raises(ValueError, match="gaps"):
        adamw([torch.nn.Parameter(torch.zeros(4, 4)[:, :2])])


def test_a_parameter_that_somebody_else_changed_is_trained_from_what_it_is(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params = parameters(torch.bfloat16)
    optimizer = adamw(params, 1e-6)
    with torch.no_grad():  # a checkpoint of the model, loaded after the optimizer was made
        params[4].fill_(3.0)
    run(optimizer, params, give_grads, range(2))
    assert torch.equal(params[4], torch.full_like(params[4], 3.0)), "so small a step rounds away"
    master = states_of(optimizer)[4]["master_param"]
    assert (master != 3).any()
    assert (master - 3).abs().max() < 1e-4
    with torch.no_grad():
        params[4].fill_(5.0)
    run(optimizer, params, give_grads, range(2, 3))
    assert (states_of(optimizer)[4]["master_param"] - 5).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"lr": "1e-3"}, "lr='1e-3' is no number"),
        ({"max_norm": 0.0}, "max_norm=0.0"),
        ({"max_norm": "1"}, "max_norm='1' is no number"),
        ({"placement": "disk"}, "placement='disk' is not a tier"),
        ({"amsgrad": True}, "amsgrad=True is not offered"),
        ({"placement": "host=0.4,ssd=0.5"}, "add up to 0.9, not to 1"),
        ({"placement": "host=0.4,host=0.6"}, "stands there once"),
        ({"placement": "host=x,ssd=1"}, "'host=x'"),
        ({"placement": "ssd=1.0", "staging_bytes": 1 << 14}, "staging_bytes=16384 is too little"),
        ({"threads": 0}, "threads=0"),
        ({"staging_byte": 1}, "did you mean 'staging_bytes'"),
        ({"learning_rate": 1}, r"AdamW.learning_rate is not a setting .* lr, "),
        ({"subgroup_params": 0}, "subgroup_params=0"),
        ({"subgroup_params": 1.5}, "subgroup_params=1.5"),
        ({"io_engine": "urin"}, "did you mean 'uring'"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(
    adamw: Make, parameters: Make, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        adamw(parameters(), **settings)


def test_what_cannot_be_trained_so_is_refused_by_name(adamw: Make, parameters: Make) -> None:
    with pytest.raises(ValueError, match="names no directory"):
        offload.AdamW(parameters(), placement="ssd")
    with pytest.raises(ValueError, match="placement=None is no tier's name"):
        offload.AdamW(parameters(), placement=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float64"):
        adamw([torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))])
    optimizer = adamw(parameters(), fused=True, foreach=None, capturable=False)
    with pytest.raises(ValueError, match="amsgrad=True"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "amsgrad": True})
    assert len(optimizer.param_groups) == 1
    embedding = torch.nn.Embedding(4, 4, sparse=True)
    optimizer = adamw(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert states_of(optimizer) == {}


def test_an_ssd_too_small_is_said_when_it_is_made(adamw: Make, parameters: Make) -> None:
    with pytest.raises(OSError, match=r"need \d+ bytes on the SSD.*but there are 65536"):
        adamw(parameters(), placement="ssd", spill_bytes=1 << 16)


def test_memory_stays_within_staging_whatever_the_model(adamw: Make, give_grads: Make) -> None:
    params = [torch.nn.Parameter(torch.randn(1 << 18)) for _ in range(8)]  # 16 MiB of states
    optimizer = adamw(
        params,
        placement="ssd",
        subgroup_params=1 << 15,
        staging_bytes=1 << 20,
        spill_bytes=1 << 27,
    )
    run(optimizer, params, give_grads, range(2))
    counters = optimizer._placement._tier.counters()
    assert counters["native_peak_bytes"] <= 1 << 20
    assert counters["read_bytes"] > 14 << 20
    optimizer.close()
    optimizer.close()
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.step()


def test_nothing_is_left_when_it_is_forgotten(
    parameters: Make, give_grads: Make, spill_dir: Any
) -> None:
    params = parameters()
    optimizer = offload.AdamW(
        params,
        placement="ssd",
        path=spill_dir,
        staging_bytes=1 << 20,
        subgroup_params=1000,
        spill_bytes=1 << 24,
    )
    run(optimizer, params, give_grads, range(2))
    tier = optimizer._placement._tier
    assert tier is not None
    del optimizer
    gc.collect()
    with pytest.raises(RuntimeError, match="closed"):
        tier.stage(4096, 0)


def test_groups_may_give_their_parameters_once_only(adamw: Make, parameters: Make) -> None:
    params = parameters()
    named = [(str(number), param) for number, param in enumerate(params[4:])]
    groups = [
        {"params": iter(params[:2]), "lr": 0.1},
        {"params": params[2]},
        {"params": [params[3]]},
        {"params": (param for param in params[4:])},
    ]
    optimizer = adamw(groups)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1, 1, len(params) - 4]
    assert len(adamw(iter(params)).param_groups[0]["params"]) == len(params)
    assert len(adamw(iter(named)).param_groups[0]["params"]) == len(named)
    with pytest.raises(TypeError, match="ordered"):
        adamw([{"params": set(params)}])
    with pytest.raises(TypeError, match="one tensor"):
        adamw(params[0])


def test_updates_run_on_the_chosen_cpus_only(adamw: Make, parameters: Make) -> None:
    (cpu, *_) = os.sched_getaffinity(0)
    before = set(os.listdir("/proc/self/task"))
    adamw(parameters(), threads=None, cpus=[cpu])
    (own,) = set(os.listdir("/proc/self/task")) - before
    assert os.sched_getaffinity(int(own)) == {cpu}
    with pytest.raises(ValueError, match=rf"cpus=\(1000,\).*may use {cpu}"):
        adamw(parameters(), cpus=[1000])


def test_it_is_not_copied_and_its_settings_are_not_a_groups(adamw: Make, parameters: Make) -> None:
    params = parameters()
    optimizer = adamw(params)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copied(optimizer)
    with pytest.raises(ValueError, match="placement is a setting of the whole AdamW"):
        adamw([{"params": params, "placement": "ssd"}])
    with pytest.raises(ValueError, match=r"betas=0\.9 are not two numbers"):
        adamw(params, betas=0.9)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="lr=None is no number"):
        optimizer.step()
