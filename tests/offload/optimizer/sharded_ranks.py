"""What two ranks do with parameters that each has a part of; run by test_sharded.py."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import offload
from offload.config import OptimizerConfig
from offload.integrations.deferred_adamw import DeferredAdamW

SETTINGS: dict[str, Any] = {"lr": 1e-2, "subgroup_params": 50}
SPILL = sys.argv[1]


def model_of(*, sharded: bool, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    # Of odd sizes, one of which gives the second rank nothing.
    model = nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 1))
    model.to(dtype)
    return shard(model) if sharded else model


def shard(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def backward(model: nn.Module, number: int, *, adds: bool = False) -> None:
    dtype = next(model.parameters()).dtype
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(number)).to(dtype)
    if not adds:
        model.zero_grad()
    model(x).square().sum().backward()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    equal = [torch.equal(whole(mine), whole(theirs)) for mine, theirs in pairs]
    return all(equal)  # after all ranks have gathered all


def train_beside(optimizer: Any, model: nn.Module, plain: Any, other: nn.Module) -> None:
    """Let a plain copy of a sharded model have the same gradients, to the bit."""
    for number in range(5):
        backward(model, number)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            theirs.grad = whole(mine.grad).clone()
        optimizer.step()
        plain.step()
        assert same(model, other), number


def check_bits(placement: dict[str, Any], dtype: torch.dtype) -> None:
    model, other = model_of(sharded=True, dtype=dtype), model_of(sharded=False, dtype=dtype)
    optimizer = offload.AdamW(model.parameters(), **SETTINGS, **placement)
    train_beside(optimizer, model, offload.AdamW(other.parameters(), **SETTINGS), other)
    optimizer.close()


def check_checkpoints(make: Callable[[nn.Module], Any]) -> None:
    """Go on from another optimizer's checkpoint, as if it had been ours."""
    model, other = model_of(sharded=True), model_of(sharded=True)
    first = make(model)
    for number in range(3):
        backward(model, number)
        first.step()
    other.load_state_dict(model.state_dict())
    second = offload.AdamW(other.parameters(), **SETTINGS)
    set_optimizer_state_dict(other, second, get_optimizer_state_dict(model, first))
    third = offload.AdamW(model.parameters(), **SETTINGS)
    third.load_state_dict(first.state_dict())
    for number in range(3, 6):
        for each, optimizer in ((model, third), (other, second)):
            backward(each, number)
            optimizer.step()
    assert same(model, other)
    moments = second.state_dict()["state"][0]["exp_avg"]
    assert moments.placements == next(other.parameters()).placements


def check_whole_states() -> None:
    """Take over the checkpoint of a model that was not sharded."""
    model, other = model_of(sharded=True), model_of(sharded=False)
    plain = offload.AdamW(other.parameters(), **SETTINGS)
    for number in range(2):
        backward(other, number)
        plain.step()
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            (shard,) = (theirs.chunk(dist.get_world_size())[dist.get_rank() :][:1]) or (None,)
            if shard is not None:
                mine.to_local().copy_(shard)
    optimizer = offload.AdamW(model.parameters(), **SETTINGS)
    optimizer.load_state_dict(plain.state_dict())
    train_beside(optimizer, model, plain, other)


def check_norm() -> None:
    model = model_of(sharded=True)
    optimizer = offload.AdamW(model.parameters(), **SETTINGS, max_norm=0.1)
    backward(model, 0)
    grads = [whole(param.grad) for param in model.parameters()]
    optimizer.step()
    expected = torch.cat([grad.flatten() for grad in grads]).double().norm()
    assert math.isclose(optimizer.total_norm, float(expected), rel_tol=1e-6)
    norms: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(norms, optimizer.total_norm)
    assert len(set(norms)) == 1
    before = [whole(param).clone() for param in model.parameters()]
    backward(model, 1)
    if dist.get_rank() == 0:
        next(model.parameters()).grad.to_local()[0] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for old, param in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, whole(param))


def check_early_gradients() -> None:
    model, other = model_of(sharded=True), model_of(sharded=True)
    optimizer = offload.AdamW(model.parameters(), **SETTINGS, early_gradients=True)
    plain = offload.AdamW(other.parameters(), **SETTINGS)
    for number in range(3):
        for micro_batch in range(2):
            backward(model, 10 * number + micro_batch, adds=True)
            backward(other, 10 * number + micro_batch, adds=True)
        assert all(param.grad is None for param in model.parameters())
        optimizer.step()
        plain.step()
        plain.zero_grad()
        assert same(model, other)


def check_switched_parameters() -> None:
    """Have an optimizer of whole parameters train their parts, as accelerate does with FSDP2."""
    model, other = model_of(sharded=False), model_of(sharded=False)
    config = OptimizerConfig(placement="ssd", path=(SPILL,), subgroup_params=50)
    optimizer = DeferredAdamW(model.parameters(), config, lr=1e-2)
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does with every one
    names = [name for name, _ in model.named_parameters()]
    shard(model)
    parts = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [parts[name] for name in names]
    train_beside(optimizer, model, offload.AdamW(other.parameters(), **SETTINGS), other)
    assert optimizer.memory_bytes() > 0
    optimizer.close()


def check_refusals() -> None:
    optimizer = offload.AdamW(model_of(sharded=True).parameters(), **SETTINGS)
    for refused in (optimizer.save, optimizer.load):
        with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint"):
            refused(f"{SPILL}/states.safetensors")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for placement in ({}, {"placement": "host=0.4,ssd=0.6", "path": SPILL}):
        for dtype in (torch.float32, torch.bfloat16):
            check_bits(placement, dtype)
    check_checkpoints(lambda model: offload.AdamW(model.parameters(), **SETTINGS))
    check_checkpoints(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2))
    check_whole_states()
    check_norm()
    check_early_gradients()
    check_switched_parameters()
    check_refusals()
    dist.destroy_process_group()
    print("all ranks agree")
