"""The same computation with and without offload, compared bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import offload

MIB = 1 << 20


class Run:
    """How a test computes: `act` is None for the reference, which has no hooks."""

    def __init__(self, act: offload.ActivationOffload | None) -> None:
        self.act = act

    def forward(self) -> Any:
        return contextlib.nullcontext() if self.act is None else self.act.forward()

    def written(self) -> None:
        """Wait until everything is on the SSD, so that the backward has to read it."""
        if self.act is not None:
            self.act.transfers.drain()


Computation = Callable[[Run], Sequence[torch.Tensor]]


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    return flat.view(torch.uint8).numpy().tobytes()


def outcome(computation: Computation, run: Run) -> list[Any]:
    torch.manual_seed(0)
    try:
        return [
            (tensor.dtype, tensor.shape, tensor.stride(), bits(tensor))
            for tensor in computation(run)
        ]
    except RuntimeError as error:
        # PyTorch's own error for the same mistake differs in its details only.
        return ["inplace" if "modified by an inplace operation" in str(error) else str(error)]


@pytest.fixture
def same_bits() -> Callable[[offload.ActivationOffload, Computation], list[Any]]:
    """Compare a computation with and without offload: equal bits, or the same error."""

    def compare(act: offload.ActivationOffload, computation: Computation) -> list[Any]:
        expected = outcome(computation, Run(None))
        assert outcome(computation, Run(act)) == expected
        return expected

    return compare


@pytest.fixture
def make(spill_dir: Path) -> Iterator[Callable[..., offload.ActivationOffload]]:
    """Make small instances that offload everything; afterwards nothing may be left behind."""
    made: list[offload.ActivationOffload] = []

    def open_instance(**settings: Any) -> offload.ActivationOffload:
        chosen: dict[str, Any] = {
            "path": spill_dir,
            "min_tensor_bytes": 0,
            "staging_bytes": 4 * MIB,
            "spill_bytes": 64 * MIB,
            "block_bytes": 4096,
            "schedule": "all",
        } | settings
        made.append(offload.ActivationOffload(**chosen))
        return made[-1]

    open_instance.made = made  # type: ignore[attr-defined]
    yield open_instance
    for act in made:
        act.close()
    assert list(spill_dir.iterdir()) == []


class _Probe(torch.autograd.Function):
    """Saves tensors and shows in its backward how they came back."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, seen: list[Any], *tensors: torch.Tensor) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.seen = seen
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        for tensor in ctx.saved_tensors:
            flags = (tensor.is_conj(), tensor.is_neg(), tensor.data_ptr() % 64)
            described = (tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
            ctx.seen.append((described, flags, bits(tensor)))
        return (grad, None, *[None] * len(ctx.saved_tensors))


@pytest.fixture
def come_back(make: Any) -> Callable[..., offload.ActivationStats]:
    """Save what `build` returns in one node, and compare each tensor's way back with none at all.

    Nobody holds the tensors in between, and the writes are waited for: what is seen was read.
    """

    def check(build: Callable[[], Sequence[torch.Tensor]], **settings: Any) -> Any:
        act = make(**settings)
        seen: tuple[list[Any], list[Any]] = ([], [])
        for run, log in ((Run(None), seen[0]), (Run(act), seen[1])):
            torch.manual_seed(0)
            anchor = torch.ones(1, requires_grad=True)
            with run.forward():
                out = _Probe.apply(anchor, log, *build())
            run.written()
            out.sum().backward()
        assert len(seen[0]) > 0
        assert seen[1] == seen[0]
        return act.stats()

    return check
