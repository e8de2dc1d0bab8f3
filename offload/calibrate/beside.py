"""By how much a processor that computes is held up by what goes to a drive and back meanwhile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.activations import ActivationOffload

__all__ = ["HeldUp", "measure_held_up"]

_LAYERS = 6
_CHANNELS = 512
_TOKENS = (1024, 8192)  # 2 and 16 MiB a tensor
_STEPS = 4  # of which the first are planned
_STAGING_BYTES = 64 << 20


@dataclass(frozen=True)
class HeldUp:
    """What moving costs a step that computes on the same processor, waits apart."""

    bytes_per_s: float
    """Moved, both ways together, for each second that the step is longer."""
    tensor_s: float
    """By how much each tensor makes it longer besides."""


def measure_held_up(path: str, rounds: int) -> HeldUp | None:
    """Train layers with what they save kept, and moved to `path`, in turns; compare the steps.

    Twice, with small tensors and large ones: what a tensor costs and what a byte costs follow from
    both. None where moving costs too little to be told from noise, or nothing could be moved.
    """
    (few_bytes, count, small_s), (many_bytes, _, large_s) = (
        _held_up(path, tokens, rounds) for tokens in _TOKENS
    )
    if not 0 < few_bytes < many_bytes:
        return None
    byte_s = (large_s - small_s) / (many_bytes - few_bytes)
    if byte_s <= 0:
        byte_s = large_s / many_bytes
    if byte_s <= 0:
        return None
    tensor_s = max(0.0, (small_s - few_bytes * byte_s) / count)
    return HeldUp(1 / byte_s, tensor_s)


def _held_up(path: str, tokens: int, rounds: int) -> tuple[int, int, float]:
    """Return bytes and tensors that a step moves, and by how much it is longer for that."""
    layers = [nn.Sequential(nn.Linear(_CHANNELS, _CHANNELS), nn.GELU()) for _ in range(_LAYERS)]
    model, x = nn.Sequential(*layers), torch.randn(tokens, _CHANNELS)
    lost = []
    everything: dict[str, Any] = {"staging_bytes": _STAGING_BYTES, "schedule": "all"}
    with ActivationOffload(tier="ssd", path=path, **everything) as act:
        for turn in range(_STEPS * (rounds + 1)):
            kept_s = _seconds(model, x, nullcontext)
            before = act.stats()
            moved_s = _seconds(model, x, act.forward)
            after = act.stats()
            if turn >= _STEPS:
                lost.append(moved_s - (after.stall_s - before.stall_s) - kept_s)
        nbytes = after.offloaded_bytes - before.offloaded_bytes
    count = nbytes // (x.nbytes) or 1
    return 2 * nbytes, count, statistics.median(lost)


def _seconds(
    model: nn.Module, x: torch.Tensor, forward: Callable[[], AbstractContextManager[Any]]
) -> float:
    begin_s = time.perf_counter()
    with forward():
        loss = model(x).sum()
    torch.autograd.backward(loss)
    return time.perf_counter() - begin_s
