"""What attention gives for kept tokens, added where they stand: nothing is padded with zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offload.tokens.selection import Kept

__all__ = ["KeptRows", "add_rows", "take_rows"]

# In place the whole tensor is asked for: who wrote so may look at the same tensor afterwards.
_ADDS = {"add", "__add__", "__radd__"}
_SCALES = {"mul", "__mul__", "__rmul__"}


def take_rows(x: Tensor, kept: Kept) -> Tensor:
    """Return [batch, kept, channels] of `x` [batch, sequence, channels], what is kept of it.

    That copy is what maps save of it for their backward: nothing of the other tokens.
    """
    taken: Tensor = _Take.apply(x, kept)  # type: ignore[no-untyped-call]
    return taken


def add_rows(residual: Tensor, rows: Tensor, kept: Kept) -> Tensor:
    """Return `residual` with `rows` added where they stand; all else is as it was, bit for bit."""
    added: Tensor = _Add.apply(residual, rows, kept)  # type: ignore[no-untyped-call]
    return added


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Kept) -> Tensor:
        ctx.kept, ctx.shape = kept, x.shape
        return _rows(x, kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        of_all = grads[0].new_zeros(ctx.shape)
        for whole, part, rows in zip(of_all, grads[0], ctx.kept.rows, strict=True):
            whole[rows] = part
        return of_all, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, rows: Tensor, kept: Kept) -> Tensor:
        ctx.kept = kept
        out = residual.clone()
        for whole, part, at in zip(out, rows, kept.rows, strict=True):
            whole.index_add_(0, at, part)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        of_rows = _rows(grads[0], ctx.kept) if ctx.needs_input_grad[1] else None
        return grads[0], of_rows, None


def _rows(x: Tensor, kept: Kept) -> Tensor:
    if x.shape[0] == 1:
        return x[0].index_select(0, kept.rows[0])[None]
    return torch.stack([one.index_select(0, at) for one, at in zip(x, kept.rows, strict=True)])


class KeptRows:
    """Stands for [batch, sequence, channels] that is zero but for some rows, until it is added.

    A layer adds what its attention returns to the residual: that is done row by row. Scaling and
    dropout leave zeros as they are. Whatever else is asked of it is asked of the whole tensor.
    """

    def __init__(self, rows: Tensor, kept: Kept) -> None:
        self.rows, self.kept = rows, kept

    def padded(self) -> Tensor:
        """Return the whole tensor."""
        shape = (self.rows.shape[0], self.kept.tokens, *self.rows.shape[2:])
        return add_rows(self.rows.new_zeros(shape), self.rows, self.kept)

    def __getattr__(self, name: str) -> Any:
        if name in ("rows", "kept"):  # not there yet
            raise AttributeError(name)
        if name in ("dtype", "device", "requires_grad"):
            return getattr(self.rows, name)
        return getattr(self.padded(), name)

    def __add__(self, other: Any) -> Any:
        return _sum(self, other)

    __radd__ = __add__

    def __mul__(self, other: Any) -> Any:
        return _scaled(self, other)

    __rmul__ = __mul__

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
            return cls(function(args[0].rows, *args[1:], **named), args[0].kept)
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
        return KeptRows(part.rows + whole.rows, part.kept)
    whole = _whole(whole)
    shape = (part.rows.shape[0], part.kept.tokens, *part.rows.shape[2:])
    if isinstance(whole, Tensor) and whole.shape == shape and whole.dtype == part.rows.dtype:
        return add_rows(whole, part.rows, part.kept)
    return part.padded() + whole


def _scaled(one: Any, other: Any) -> Any:
    part, factor = (one, other) if isinstance(one, KeptRows) else (other, one)
    if isinstance(factor, (int, float)) or (isinstance(factor, Tensor) and factor.dim() == 0):
        return KeptRows(part.rows * factor, part.kept)
    return part.padded() * _whole(factor)
