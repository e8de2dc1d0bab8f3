"""The loss of a long sequence in segments, so that its logits are never there as a whole.

A segment's gradients are made as soon as its loss is, in the forward: what stays is one gradient of
the hidden states, and of the head's parameters where those are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["IGNORED", "segment_tokens_for", "segmented_cross_entropy"]

IGNORED = -100
"""The label of a token that has no part in the loss, as PyTorch's `cross_entropy` has it."""
_LOGITS_BYTES = 16 << 20
_LEAST, _MOST = 64, 8192


def segment_tokens_for(vocab_size: int) -> int:
    """Return how many tokens' logits take 16 MiB in fp32: a power of two from 64 to 8,192."""
    tokens = max(1, _LOGITS_BYTES // (4 * vocab_size))
    return min(_MOST, max(_LEAST, 1 << (tokens.bit_length() - 1)))


def segmented_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    params: Sequence[Tensor] = (),
    segment_tokens: int = 1024,
    count: Tensor | float | None = None,
    ignored: int = IGNORED,
) -> Tensor:
    """Return the cross-entropy of `head(hidden)` and `targets`, in fp32, a scalar.

    `hidden` is [..., channels], and `targets` has a token's class for each of its rows, those with
    `ignored` are left out: nothing is computed for them. `head` gives a row's logits from that row
    alone; `params` are its parameters, whose gradients it has. The sum over tokens is divided by
    `count`, or by how many are not ignored, before gradients are made, so that those are as of the
    whole; with none at all the loss is NaN, as PyTorch's. Autograd may go through it once.

    At its worst moment it holds a segment's logits four times over, in fp32.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} are not one for each row of hidden states of "
            f"shape {tuple(hidden.shape)}"
        )
    if segment_tokens < 1:
        raise ValueError(f"segment_tokens={segment_tokens} is not a whole number from 1 up")
    trained = tuple(param for param in params if param.requires_grad)
    given = (hidden, head, targets, segment_tokens, count, ignored, *trained)
    loss: Tensor = _Segmented.apply(*given)  # type: ignore[no-untyped-call]
    return loss


class _Segmented(torch.autograd.Function):
    """Makes the gradients with the loss; backward scales them by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        targets: Tensor,
        segment_tokens: int,
        count: Tensor | float | None,
        ignored: int,
        *params: Tensor,
    ) -> Tensor:
        rows, flat = hidden.detach().reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        kept = (flat != ignored).nonzero().squeeze(-1)
        whole = kept.numel() if count is None else count
        wanted = [hidden.requires_grad, *(param.requires_grad for param in params)]
        of_hidden = torch.zeros_like(rows) if wanted[0] else None
        # Hundreds of segments would swallow each other in lower precision.
        of_params = [torch.zeros_like(param, dtype=torch.float32) for param in params]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Nothing of a segment outlives it, so that nobody else's hooks are to see it.
        with saved_tensors_hooks(_as_it_is, _as_it_is):
            for chosen in _segments(kept, segment_tokens):
                part = rows[chosen].requires_grad_(wanted[0])
                with torch.enable_grad():
                    logits = head(part)
                    _require_range(logits)
                    logits = logits.float()
                    own = F.cross_entropy(logits, flat[chosen], reduction="sum") / whole
                loss += own.detach()
                if not any(wanted):
                    continue
                inputs = [part] * wanted[0] + list(params)
                found = list(torch.autograd.grad(own, inputs))
                del logits, own, part
                if of_hidden is not None:
                    of_hidden[chosen] = found.pop(0)
                for total, each in zip(of_params, found, strict=True):
                    total += each
        if not kept.numel() and count is None:
            loss = loss / 0
        ctx.shape = hidden.shape
        ctx.wanted = wanted
        made = [each.to(param.dtype) for each, param in zip(of_params, params, strict=True)]
        ctx.save_for_backward(*(each for each in (of_hidden, *made) if each is not None))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *from_above: Tensor) -> Any:
        saved = [each * from_above[0] for each in ctx.saved_tensors]
        of_hidden = saved.pop(0).view(ctx.shape) if ctx.wanted[0] else None
        return (of_hidden, None, None, None, None, None, *saved)


def _segments(kept: Tensor, segment_tokens: int) -> Iterator[Tensor]:
    yield from (each for each in torch.split(kept, segment_tokens) if each.numel())


def _require_range(logits: Tensor) -> None:
    """Raise ValueError for logits whose gradients a loss scale would have to keep from 0."""
    if logits.dtype == torch.float16:
        raise ValueError(
            "logits are of float16, whose gradients are made in segments before a loss scale comes "
            "to them: train in bfloat16, or tokens.mode can only be off"
        )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
