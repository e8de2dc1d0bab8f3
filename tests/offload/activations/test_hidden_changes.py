"""Changes that PyTorch's version counter does not see end in the right numbers or in an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

SIZE = 64


def test_buffer_refilled_between_forwards_is_saved_again(make: Any) -> None:
    act = make(min_tensor_bytes=0)
    weight = torch.zeros(SIZE, SIZE, requires_grad=True)
    buffer = torch.zeros(SIZE, SIZE)
    source = buffer.numpy()
    losses = []
    for value in (1.0, 2.0):
        source[:] = value
        with act.forward():
            losses.append((buffer * weight).sum())
    del buffer, source
    found = []
    for loss in losses:
        weight.grad = None
        loss.backward()
        assert weight.grad is not None
        found.append(weight.grad[0, 0].item())
    assert found == [1.0, 2.0]


def test_parameter_changed_through_data_is_not_cast_again(make: Any) -> None:
    act = make(min_tensor_bytes=0)
    layers = torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE), torch.nn.Linear(SIZE, SIZE))
    with act.forward(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layers(torch.randn(SIZE, SIZE)).float().square().mean()
    assert act.stats().recast_bytes > 0
    for parameter in layers.parameters():
        parameter.data.mul_(2)
    with pytest.raises(RuntimeError, match="recast_parameters=False"):
        loss.backward()


def test_parameter_changed_through_data_keeps_its_stored_copy(make: Any) -> None:
    grads = []
    for act in (None, make(min_tensor_bytes=0, recast_parameters=False)):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE), torch.nn.Linear(SIZE, SIZE))
        batch = torch.randn(SIZE, SIZE)
        context = act.forward() if act is not None else torch.enable_grad()
        with context, torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layers(batch).float().square().mean()
        for parameter in layers.parameters():
            parameter.data.mul_(2)
        loss.backward()
        grads.append([parameter.grad for parameter in layers.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_close_gives_space_and_staging_back_while_a_graph_lives(make: Any, spill_dir: Path) -> None:
    act = make(min_tensor_bytes=0)
    weight = torch.randn(SIZE, SIZE, requires_grad=True)
    with act.forward():
        loss = (torch.randn(SIZE, SIZE) * weight).sin().sum()
    act.close()
    assert act.stats().native_bytes == 0
    blocks = 0
    for entry in Path("/proc/self/fd").iterdir():
        target = os.readlink(entry) if entry.is_symlink() else ""
        if target.startswith(str(spill_dir)) and target.endswith("(deleted)"):
            blocks += os.stat(entry).st_blocks
    assert blocks == 0
    assert loss.requires_grad


@pytest.mark.parametrize("value", [2**64 - 1, 2**70])
@pytest.mark.parametrize("key", ["staging_bytes", "spill_bytes", "min_tensor_bytes"])
def test_size_beyond_every_machine_is_refused_by_name(make: Any, key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{key}={value}"):
        make(**{key: value})
