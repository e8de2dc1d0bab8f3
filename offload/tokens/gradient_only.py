"""Modules whose forward is exact, and whose backward goes through kept tokens alone.

After TokenTune (arXiv 2501.18824) and TokenSeek (arXiv 2601.19739): all tokens take part in the
forward, and maps save what they need for the gradients of some. Here they are chosen anew in each
layer, and the residual's gradient passes all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload.tokens.elimination import Choose, Eliminating, Following, cut
from offload.tokens.interception import AttentionCalls
from offload.tokens.kept_rows import take_rows
from offload.tokens.selection import Kept

__all__ = ["GradientOnly", "GradientOnlyFollowing"]

_CHUNK = 1024
"""Rows of attention at a time, whose mask has as many rows and not all columns."""


class GradientOnly(Eliminating):
    """Has gradients of an attention module go through what `choose` keeps, until `close()`d.

    What it returns is the module's own output for all tokens. Kept tokens' queries, keys and values
    get gradients from kept tokens' outputs; the keys and values of the others are constants there.
    Raises ValueError for a module with dropout, which would be drawn twice.
    """

    def __init__(
        self, module: nn.Module, layer: int, choose: Choose, *, active: Callable[[], bool]
    ) -> None:
        _refuse_dropout(module)
        super().__init__(module, layer, choose, active=active)

    def _run_kept(
        self, hidden: Tensor, rest: tuple[Any, ...], named: dict[str, Any], kept: Kept
    ) -> Any:
        with torch.no_grad(), _Seen() as seen:
            whole = self._whole(hidden, *rest, **named)
        if not torch.is_grad_enabled():  # a checkpoint's first forward
            return whole
        parts = []
        for n, rows in enumerate(kept.rows):
            with _RowsOverAll(seen.only(type(self._module).__name__), rows, n):
                given = cut(named, kept, n)
                found = self._whole(take_rows(hidden[n : n + 1], rows), *rest, **given)
            parts.append(found if isinstance(found, Tensor) else found[0])
        if isinstance(whole, Tensor):
            return through(whole, parts, kept.rows)
        return (through(whole[0], parts, kept.rows), *whole[1:])


class GradientOnlyFollowing(Following):
    """Has gradients of a perceptron go through the tokens that its layer's attention kept.

    Raises ValueError for a module with dropout.
    """

    def __init__(self, module: nn.Module, attention: Eliminating) -> None:
        _refuse_dropout(module)
        super().__init__(module, attention)

    def _run_kept(self, x: Tensor, kept: Kept) -> Any:
        with torch.no_grad():
            whole = self._whole(x)
        if not torch.is_grad_enabled():
            return whole
        parts = [self._whole(take_rows(x[n : n + 1], rows)) for n, rows in enumerate(kept.rows)]
        return through(whole, parts, kept.rows)


def through(whole: Tensor, parts: Sequence[Tensor], rows: Sequence[Tensor], dim: int = 1) -> Tensor:
    """Return `whole`, whose gradient at `rows` of `dim` goes to `parts`, one for each sequence."""
    found: Tensor = _Through.apply(whole, tuple(rows), dim, *parts)  # type: ignore[no-untyped-call]
    return found


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, whole: Tensor, rows: tuple[Tensor, ...], dim: int, *_parts: Tensor
    ) -> Tensor:
        ctx.rows, ctx.dim = rows, dim
        return whole.detach()  # and no view of it, which nobody might add to in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        of_parts = [grads[0][n : n + 1].index_select(ctx.dim, at) for n, at in enumerate(ctx.rows)]
        return (None, None, None, *of_parts)


class _Seen(AttentionCalls):
    """While entered, keeps what PyTorch's attention was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def attend(self, given: dict[str, Any]) -> Any:
        """Note the call."""
        if given.get("dropout_p"):
            raise ValueError(
                f"attention has dropout ({given['dropout_p']}), which would be drawn once for the "
                "output and once more for gradients: set it to 0, or tokens.mode to sparse"
            )
        self.calls.append(given | {"query": None})
        return super().attend(given)

    def only(self, name: str) -> dict[str, Any]:
        """Return the one call. Raises ValueError for none, or more."""
        if len(self.calls) != 1:
            raise ValueError(
                f"{name} calls PyTorch's scaled_dot_product_attention {len(self.calls)} times and "
                "not once: load the model with attn_implementation='sdpa', or set tokens.mode to "
                "exact"
            )
        return self.calls[0]


class _RowsOverAll(AttentionCalls):
    """While entered, PyTorch's attention of some rows of a sequence is over all of its columns."""

    def __init__(self, of_all: dict[str, Any], rows: Tensor, number: int) -> None:
        super().__init__()
        self._of_all, self._rows, self._number = of_all, rows, number

    def attend(self, given: dict[str, Any]) -> Any:
        """Attend from the rows alone."""
        own = slice(self._number, self._number + 1)
        key, value = (
            through(self._of_all[name][own], [given[name]], [self._rows], dim=2)
            for name in ("key", "value")
        )
        mask = self._of_all.get("attn_mask")
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask[own]
        more = {name: given[name] for name in ("scale", "enable_gqa") if name in given}
        parts = []
        chunks = zip(
            torch.split(self._rows, _CHUNK), torch.split(given["query"], _CHUNK, 2), strict=True
        )
        for at, query in chunks:
            end, seen = key.shape[2], None
            if mask is not None:
                seen = mask if mask.shape[-2] == 1 else mask.index_select(-2, at)
            elif self._of_all.get("is_causal"):
                end = int(at[-1]) + 1  # rows ascend
                seen = torch.arange(end, device=at.device) <= at[:, None]
            columns = (key[:, :, :end], value[:, :, :end])
            parts.append(F.scaled_dot_product_attention(query, *columns, attn_mask=seen, **more))
        return torch.cat(parts, dim=2)


def _refuse_dropout(module: nn.Module) -> None:
    for name, each in module.named_modules():
        if isinstance(each, nn.modules.dropout._DropoutNd) and each.p > 0:
            raise ValueError(
                f"{type(module).__name__}.{name} drops out {each.p:g} of its input, which would be "
                "drawn once for the output and once more for gradients: set it to 0 (lora_dropout "
                "of PEFT's, say), or tokens.mode to sparse"
            )
