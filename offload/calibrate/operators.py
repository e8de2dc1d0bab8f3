"""The rates of a model's operators on a device: products of matrices, attention, and the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from offload.calibrate.timing import Stopwatch
from perfmodel.operator_times import BACKWARD

__all__ = ["COMPUTING", "PROBE", "Piece", "operator_pieces", "seconds_of", "tiny"]

COMPUTING = frozenset(
    name + way for name in ("linear", "attention", "attention to all") for way in ("", BACKWARD)
)
"""Whose rates are flops, of each type."""
PROBE = 1024, 512, 2048
"""Rows and channels of the product that tells how fast the machine is at the moment."""

_CHANNELS = 512
_HEAD = 64
_CLASSES = 4096


@dataclass(frozen=True)
class Piece:
    """Work that is timed: what it is counted as, how much of it there is, and doing it."""

    name: str
    dtype: str
    amount: float
    """Flops or bytes."""
    size: float
    """What its rate is a curve over: the same, or of attention flops for each byte of queries."""
    nbytes: int
    """Read and written."""
    prepare: Callable[[], Callable[[], object]]
    """Makes what it takes, and returns what is timed."""


# What a piece of work goes round, so that a cache has little of it when it is its turn again.
_COLD_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
_MOST_COPIES = 32


def seconds_of(piece: Piece, watch: Stopwatch) -> list[float]:
    """Return how long `piece` takes, each time with other tensors of its kind."""
    copies = min(_MOST_COPIES, max(1, _COLD_BYTES[watch.device.type] // piece.nbytes))
    return watch.seconds(*(piece.prepare() for _ in range(copies)))


def operator_pieces(device: torch.device, dtype: torch.dtype, mib: Sequence[int]) -> list[Piece]:
    """Return what is timed on `device`: operators over tensors of `mib` MiB each."""
    return [*_matmuls(device, dtype), *_attention(device, dtype), *_others(device, dtype, mib)]


def tiny(device: torch.device) -> Callable[[], object]:
    """Return an operator that does next to nothing."""
    x = torch.zeros(1, device=device, requires_grad=True)
    return lambda: x * 2.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _matmuls(device: torch.device, dtype: torch.dtype) -> Iterator[Piece]:
    # Rows as tokens are, and channels in and out.
    for rows, channels, width in (
        (256, 256, 256),
        (512, 512, 512),
        PROBE,
        (2048, 1024, 1024),
        (2048, 1024, 4096),
    ):

        def inputs(rows: int = rows, channels: int = channels, width: int = width) -> list[Tensor]:
            shapes = (rows, channels), (width, channels), (width,)
            made = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
            return [each.requires_grad_() for each in made]

        def forward(inputs: Callable[[], list[Tensor]] = inputs) -> Callable[[], object]:
            parts = inputs()
            return lambda: F.linear(*parts)

        def backward(inputs: Callable[[], list[Tensor]] = inputs) -> Callable[[], object]:
            parts = inputs()
            out = F.linear(*parts)
            given = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, parts, given, retain_graph=True)

        flops = 2.0 * rows * channels * width
        moved = (rows * channels + channels * width + rows * width) * dtype.itemsize
        yield Piece("linear", _name(dtype), flops, flops, moved, forward)
        yield Piece("linear" + BACKWARD, _name(dtype), 2 * flops, flops, 2 * moved, backward)


def _attention(device: torch.device, dtype: torch.dtype) -> Iterator[Piece]:
    for causal, length in itertools.product((True, False), (128, 256, 512, 1024)):
        heads = max(1, 4096 // length)
        # Of half of all pairs where each sees those before it.
        flops = 4.0 * heads * length * length * _HEAD * (0.5 if causal else 1.0)

        def inputs(heads: int = heads, length: int = length) -> list[Tensor]:
            # Side by side, as one product makes them.
            made = torch.randn(1, length, 3, heads, _HEAD, device=device, dtype=dtype)
            return [part.requires_grad_() for part in made.transpose(1, 3).unbind(2)]

        def forward(
            inputs: Callable[[], list[Tensor]] = inputs, causal: bool = causal
        ) -> Callable[[], object]:
            q, k, v = inputs()
            return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        def backward(
            inputs: Callable[[], list[Tensor]] = inputs, causal: bool = causal
        ) -> Callable[[], object]:
            parts = inputs()
            q, k, v = parts
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            given = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, parts, given, retain_graph=True)

        name = "attention" if causal else "attention to all"
        query_bytes = heads * length * _HEAD * dtype.itemsize
        size = flops / query_bytes
        yield Piece(name, _name(dtype), flops, size, 4 * query_bytes, forward)
        yield Piece(name + BACKWARD, _name(dtype), 2 * flops, size, 8 * query_bytes, backward)


@dataclass(frozen=True)
class _Kind:
    """An operator: what it reads, of how many rows, and what it does with that."""

    name: str
    run: Callable[..., Tensor]
    inputs: int = 1
    params: int = 0
    """Vectors of channels."""
    channels: int = _CHANNELS
    moved: float = 2.0
    """Tensors read and written, as a tape counts them."""
    dtype: torch.dtype | None = None


def _weigh(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


def _log_softmax(x: Tensor) -> Tensor:
    return F.log_softmax(x, -1, dtype=torch.float32)


_KINDS = (
    _Kind("gelu", F.gelu),
    _Kind("relu", F.relu),
    _Kind("silu", F.silu),
    _Kind("dropout", lambda x: F.dropout(x, 0.1)),
    _Kind(
        "layer norm",
        lambda x, weight, bias: F.layer_norm(x, (_CHANNELS,), weight, bias),
        params=2,
    ),
    _Kind("gate", torch.mul, inputs=2, moved=3.0),
    _Kind("add", torch.add, inputs=2, moved=3.0),
    _Kind("weigh", _weigh, params=1),
    _Kind("square", lambda x: x.pow(2)),
    _Kind("mean", lambda x: x.mean(-1, keepdim=True), moved=1.0),
    _Kind("negate", torch.neg),
    _Kind("cat", lambda x, y: torch.cat((x, y), -1), inputs=2, moved=4.0),
    _Kind("repeat", lambda x: x.unflatten(0, (-1, 8)).repeat_interleave(4, 1), moved=5.0),
    _Kind("softmax", lambda x: F.softmax(x, -1)),
    _Kind("log softmax", _log_softmax, channels=_CLASSES),
)


def _others(device: torch.device, dtype: torch.dtype, mib: Sequence[int]) -> Iterator[Piece]:
    for kind in _KINDS:
        for size in mib:
            nbytes = size << 20
            rows = nbytes // (kind.channels * dtype.itemsize)

            def inputs(kind: _Kind = kind, rows: int = rows) -> list[Tensor]:
                shapes = [(rows, kind.channels)] * kind.inputs + [(kind.channels,)] * kind.params
                return [
                    torch.full(shape, 0.5, device=device, dtype=dtype).requires_grad_()
                    for shape in shapes
                ]

            def forward(
                kind: _Kind = kind, inputs: Callable[[], list[Tensor]] = inputs
            ) -> Callable[[], object]:
                parts = inputs()
                return lambda: kind.run(*parts)

            def backward(
                kind: _Kind = kind, inputs: Callable[[], list[Tensor]] = inputs
            ) -> Callable[[], object]:
                parts = inputs()
                out = kind.run(*parts)
                given = torch.randn_like(out)
                return lambda: torch.autograd.grad(out, parts, given, retain_graph=True)

            moved, touched = kind.moved * nbytes, (kind.inputs + 1) * nbytes
            yield Piece(kind.name, _name(dtype), moved, moved, touched, forward)
            yield Piece(kind.name + BACKWARD, _name(dtype), moved, moved, 2 * touched, backward)
