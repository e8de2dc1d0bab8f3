"""Models, gradients and optimizers that the tests of `offload.optimizer` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import offload
from offload.device.emulated_updates import EmulatedRates, EmulatedUpdates

SHAPES = ((3,), (7, 5), (1,), (2, 3, 4), (129, 31), (64, 64), (3, 128), (5, 1, 9), (1000,))


@pytest.fixture
def parameters() -> Callable[..., list[torch.nn.Parameter]]:
    """Make parameters of odd shapes, the same ones each time."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape in SHAPES
        ]

    return make


@pytest.fixture
def give_grads() -> Callable[..., None]:
    """Give parameters the gradients of a step, the same ones for the same number."""

    def give(params: list[torch.nn.Parameter], step: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            grad = scale * torch.randn(param.shape, generator=generator)
            param.grad = grad.to(param.dtype)

    return give


@pytest.fixture
def device() -> Iterator[EmulatedUpdates]:
    """An emulated device."""
    made = EmulatedUpdates(EmulatedRates(to_host_bytes_per_s=1e8, to_device_bytes_per_s=1e8))
    yield made
    made.close()


@pytest.fixture
def adamw(spill_dir: Any) -> Iterator[Callable[..., offload.AdamW]]:
    """Make optimizers with small subgroups, closed at the end; nothing may be left behind."""
    made: list[offload.AdamW] = []

    def make(params: Any, *args: Any, **settings: Any) -> offload.AdamW:
        chosen: dict[str, Any] = {
            "subgroup_params": 1000,
            "staging_bytes": 1 << 16,  # three of them: most are read
            "spill_bytes": 1 << 24,
            "block_bytes": 4096,
            "threads": 2,
        } | settings
        if "ssd" in chosen.get("placement", ""):
            chosen["path"] = spill_dir
        made.append(offload.AdamW(params, *args, **chosen))
        return made[-1]

    yield make
    for optimizer in made:
        optimizer.close()
    assert list(spill_dir.iterdir()) == []
