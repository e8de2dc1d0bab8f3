"""How far a sparse step is from a dense one, on a batch that is kept for asking."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from offload.tokens.sparse import SparseTokens

__all__ = ["Quality", "measure_quality"]


@dataclass(frozen=True)
class Quality:
    """One look at a probe batch."""

    dense_loss: float
    sparse_loss: float
    gradient_cosine: float
    """Between both gradients of what is trained, as one vector each; 1: the same direction."""
    kept_shares: tuple[float | None, ...]
    """Of the tokens, in each layer; None where all are always kept."""

    @property
    def loss_gap(self) -> float:
        """By how much of the dense loss the sparse one is larger."""
        return self.sparse_loss / self.dense_loss - 1

    def text(self) -> str:
        """Say it in one line."""
        shares = [share for share in self.kept_shares if share is not None]
        kept = f", {sum(shares) / len(shares):.0%} of tokens kept" if shares else ""
        return (
            f"loss {self.sparse_loss:.4f} and dense {self.dense_loss:.4f} ({self.loss_gap:+.2%}), "
            f"gradient cosine {self.gradient_cosine:.3f}{kept}"
        )


def measure_quality(
    model: torch.nn.Module,
    tokens: SparseTokens,
    batch: Mapping[str, Any],
    *,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Quality:
    """Return how sparse training on `batch` differs from dense; it has labels.

    Where the loss is past the rule's `most_loss_gap` all tokens take part from then on, and a
    warning says so. Two forwards, each in a context of `around` (`Session.forward`, say), and their
    backwards, from the same random numbers; where there are ranks all of them call this, and losses
    are their mean. Parameters' `grad` is left as it is, and so is the generator. Two gradients of
    what is trained are there at once.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    was_dense, was_training = tokens.dense, model.training
    losses, found = [], []
    model.train()
    devices = sorted({param.device.index for param in params if param.is_cuda})
    try:
        for dense in (True, False):
            tokens.dense = dense
            with torch.random.fork_rng(devices):
                with around():
                    loss: Tensor = model(**batch).loss
                found.append(torch.autograd.grad(loss, params, allow_unused=True))
            losses.append(float(loss.detach()))
    finally:
        tokens.dense = was_dense
        model.train(was_training)
    dense_loss, sparse_loss = _means_over_ranks(losses, params[0].device)
    quality = Quality(dense_loss, sparse_loss, _cosine(*found), tuple(tokens.kept_shares))
    if quality.loss_gap > tokens.rule.most_loss_gap and not tokens.fallen_back:
        tokens.fallen_back = True
        warnings.warn(
            f"all tokens take part from step {tokens.step} on: {quality.text()}, and most_loss_gap="
            f"{tokens.rule.most_loss_gap}",
            RuntimeWarning,
            stacklevel=2,
        )
    return quality


def _means_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Return the same on all ranks, so that none falls back alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    means: list[float] = (total / dist.get_world_size()).tolist()
    return means


def _cosine(ones: Any, others: Any) -> float:
    product = one_square = other_square = 0.0
    for one, other in zip(ones, others, strict=True):
        if one is None or other is None:
            continue
        product += float(torch.sum(one.double() * other.double()))
        one_square += float(one.double().square().sum())
        other_square += float(other.double().square().sum())
    length = (one_square * other_square) ** 0.5
    return product / length if length else 1.0
