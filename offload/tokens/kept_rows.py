"""What attention gives for kept tokens, added where they stand: nothing is padded with zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offload.device.token_kernels import kernels_for
from offload.tokens.selection import Kept

__all__ = ["KeptRows", "add_rows", "take_rows"]

# In place the whole tensor is asked for: who wrote so may look at the same tensor afterwards.
_ADDS = {"add", "__add__", "__radd__"}
_SCALES = {"mul", "__mul__", "__rmul__"}


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return [1, kept, channels] of one sequence `x` [1, sequence, channels].

    That copy is what maps save of it for their backward: nothing of the other tokens.
    """
    taken: Tensor = _Take.apply(x, rows)  # type: ignore[no-untyped-call]
    return taken


def add_rows(residual: Tensor, parts: Sequence[Tensor], kept: Kept) -> Tensor:
    """Return `residual` [batch, sequence, channels] with the rows added where they stand.

    All else is as it was, bit for bit. On a GPU in fp32, bf16 and fp16 by kernels of our own where
    they were built, in one pass over the memory; else by PyTorch's, over a copy.
    """
    added: Tensor = _Add.apply(residual, kept, *parts)  # type: ignore[no-untyped-call]
    return added


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.rows, ctx.shape = rows, x.shape
        return x.index_select(1, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        of_all = grads[0].new_zeros(ctx.shape)
        return of_all.index_copy_(1, ctx.rows, grads[0]), None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, kept: Kept, *parts: Tensor) -> Tensor:
        ctx.kept = kept
        kernels = kernels_for(residual, *parts)
        if kernels is not None:
            residual = residual.contiguous()
            out = torch.empty_like(residual)
            for one, part, at, to in zip(residual, parts, kept.rows, out, strict=True):
                kernels.add_rows(one, part[0].contiguous(), at, to)
            return out
        out = residual.clone()
        for whole, part, at in zip(out, parts, kept.rows, strict=True):
            whole.index_add_(0, at, part[0])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[2:]
        of_parts = [
            _taken(grads[0][n : n + 1], at) if wanted else None
            for n, (at, wanted) in enumerate(zip(ctx.kept.rows, needed, strict=True))
        ]
        return (grads[0], None, *of_parts)


def _taken(whole: Tensor, rows: Tensor) -> Tensor:
    """Return rows of [1, sequence, channels]."""
    kernels = kernels_for(whole)
    if kernels is None or not whole.is_contiguous():
        return whole.index_select(1, rows)
    out = whole.new_empty(1, len(rows), *whole.shape[2:])
    kernels.take_rows(whole[0], rows, out[0])
    return out


class KeptRows:
    """Stands for [batch, sequence, channels] that is zero but for some rows, until it is added.

    A layer adds what its attention returns to the residual: that is done row by row. Scaling and
    dropout leave zeros as they are. Whatever else is asked of it is asked of the whole tensor, but
    for a change in place, which is refused: it would be a change of a copy.
    """

    def __init__(self, parts: Sequence[Tensor], kept: Kept) -> None:
        self.parts, self.kept = tuple(parts), kept

    def padded(self) -> Tensor:
        """Return the whole tensor."""
        shape = (len(self.parts), self.kept.tokens, *self.parts[0].shape[2:])
        return add_rows(self.parts[0].new_zeros(shape), self.parts, self.kept)

    def __getattr__(self, name: str) -> Any:
        if name in ("parts", "kept"):  # not there yet
            raise AttributeError(name)
        if name in ("dtype", "device", "requires_grad"):
            return getattr(self.parts[0], name)
        if name.endswith("_") and not name.endswith("__"):
            raise TypeError(
                f"{name}() would change what attention gives for some tokens in place: write it "
                "as an expression, or set tokens.mode to exact"
            )
        return getattr(self.padded(), name)

    def __add__(self, other: Any) -> Any:
        return _sum(self, other)

    __radd__ = __add__

    def __mul__(self, other: Any) -> Any:
        return _scaled(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return (
            _scaled(self, 1 / other) if isinstance(other, (int, float)) else self.padded() / other
        )

    def __neg__(self) -> Any:
        return _scaled(self, -1)

    def __sub__(self, other: Any) -> Any:
        return self.padded() - _whole(other)

    def __rsub__(self, other: Any) -> Any:
        return _sum(_scaled(self, -1), other)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Do what leaves rows as they are by themselves, all else on the whole tensor."""
        named = kwargs or {}
        name = getattr(function, "__name__", "")
        if len(args) == 2 and not named and name in _ADDS:
            return _sum(*args)
        if len(args) == 2 and not named and name in _SCALES:
            return _scaled(*args)
        if name == "dropout" and isinstance(args[0], cls):
            return cls([function(part, *args[1:], **named) for part in args[0].parts], args[0].kept)
        return function(*map(_whole, args), **{key: _whole(each) for key, each in named.items()})


def _whole(value: Any) -> Any:
    if isinstance(value, KeptRows):
        return value.padded()
    if isinstance(value, (tuple, list)):
        return type(value)([_whole(each) for each in value])
    return value


def _sum(one: Any, other: Any) -> Any:
    part, whole = (one, other) if isinstance(one, KeptRows) else (other, one)
    if isinstance(whole, KeptRows) and whole.kept is part.kept:
        pairs = zip(part.parts, whole.parts, strict=True)
        return KeptRows([mine + its for mine, its in pairs], part.kept)
    whole = _whole(whole)
    shape = (len(part.parts), part.kept.tokens, *part.parts[0].shape[2:])
    if isinstance(whole, Tensor) and whole.shape == shape and whole.dtype == part.dtype:
        return add_rows(whole, part.parts, part.kept)
    return part.padded() + whole


def _scaled(one: Any, other: Any) -> Any:
    part, factor = (one, other) if isinstance(one, KeptRows) else (other, one)
    if isinstance(factor, (int, float)) or (isinstance(factor, Tensor) and factor.dim() == 0):
        return KeptRows([each * factor for each in part.parts], part.kept)
    return part.padded() * _whole(factor)
