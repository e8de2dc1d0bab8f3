"""How far a sparse step is from a dense one, on a batch that is kept for asking."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from offload.tokens.choice import TokenChoice
from offload.tokens.without_dropout import without_dropout
from perfmodel.token_plan import SparsityRule

__all__ = ["Quality", "loss_of_output", "measure_quality"]


@dataclass(frozen=True)
class Quality:
    """One look at a probe batch."""

    dense_loss: float
    sparse_loss: float
    gradient_cosine: float
    """Between both gradients of what is trained, as one vector each, of all ranks together; 1: the
    same direction, NaN: one has none."""
    kept_shares: tuple[float | None, ...]
    """Of the tokens, in each layer; None where all are always kept."""
    recalls: tuple[float | None, ...]
    """Of the blocks that scores of all tokens would keep, how many were, in each layer."""

    @property
    def loss_gap(self) -> float:
        """By how much of the dense loss the sparse one is larger; negative: smaller."""
        return self.sparse_loss / self.dense_loss - 1

    @property
    def kept_share(self) -> float | None:
        """Of the tokens, in the layers that may leave some out; None: there is no such layer."""
        return _mean(self.kept_shares)

    @property
    def recall(self) -> float | None:
        """In the layers that left some out; None: none did."""
        return _mean(self.recalls)

    def figures(self) -> dict[str, float]:
        """Return all of it by name, for a log: of layers with their number, from 0."""
        names = ("dense_loss", "sparse_loss", "gradient_cosine", "recall")
        found = {name: getattr(self, name) for name in names}
        for name, values in (("kept_share", self.kept_shares), ("recall", self.recalls)):
            found |= {f"{name}_{number}": value for number, value in enumerate(values)}
        return {name: value for name, value in found.items() if value is not None}

    def text(self) -> str:
        """Say it in one line."""
        kept = "" if self.kept_share is None else f", {self.kept_share:.0%} of tokens kept"
        if self.recall is not None:
            kept += f", recall {self.recall:.0%}"
        return (
            f"loss {self.sparse_loss:.4f} and dense {self.dense_loss:.4f} ({self.loss_gap:+.2%}), "
            f"gradient cosine {self.gradient_cosine:.3f}{kept}"
        )


def measure_quality(
    model: torch.nn.Module,
    tokens: TokenChoice,
    batch: Mapping[str, Any],
    *,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    loss_of: Callable[[Any], Tensor] | None = None,
) -> Quality:
    """Return how sparse training on `batch` differs from dense; it has labels.

    `batch` is what the model takes by name, and `loss_of` says what its loss is (None:
    `loss_of_output`).
    Where both losses are further apart than the rule's `most_loss_gap`, whichever is larger, or
    gradients than its `least_gradient_cosine`, all tokens take part from then on, and a warning
    says so. Two forwards, each in a context of
    `around` (`Session.forward`, say), and their backwards; nothing is dropped out meanwhile, since
    fewer tokens would draw other masks. Where there are ranks all of them call this, and losses
    are their mean. Parameters' `grad` is left as it is, and so is the generator. Two gradients of
    what is trained are there at once.
    """
    params = _trained(model)
    losses, found = [], []
    with _as_it_was(model, tokens), without_dropout(model):
        for dense in (True, False):
            tokens.dense = dense
            tokens.recalls = [None] * len(tokens.kept_shares)
            with torch.random.fork_rng(_devices(params)):
                with around():
                    loss = (loss_of or loss_of_output)(model(**batch))
                found.append(torch.autograd.grad(loss, params, allow_unused=True))
            losses.append(float(loss.detach()))
        recalls, shares = tuple(tokens.recalls or ()), tuple(tokens.kept_shares)
    dense_loss, sparse_loss, *products = _means_over_ranks(
        [*losses, *_products(*found)], params[0].device
    )
    if not (math.isfinite(dense_loss) and dense_loss > 0):
        raise ValueError(
            f"the dense loss of the probe batch is {dense_loss}, to which nothing compares: give "
            "one with labels"
        )
    quality = Quality(dense_loss, sparse_loss, _cosine(*products), shares, recalls)
    limit = _passed(quality, tokens.rule)
    if limit and not tokens.fallen_back:
        tokens.fallen_back = True
        warnings.warn(
            f"all tokens take part from step {tokens.step} on: {quality.text()}, and {limit}",
            RuntimeWarning,
            stacklevel=2,
        )
    return quality


def loss_of_output(output: Any) -> Tensor:
    """Return the loss of what a model returned: its `loss`, its first part, or itself."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.dim():
        raise ValueError(
            f"the model returns no loss, one number, but {type(output).__name__}: give a batch "
            "with labels, or loss_of="
        )
    return found


def _passed(quality: Quality, rule: SparsityRule) -> str:
    """Return the limits that it is past, none where it is past none. No number is past each."""
    # A model that has learnt to do without what is left out has a small sparse loss, and the dense
    # one is what counts once it is used. Where gradients alone are sparse both losses are equal.
    kept = {
        "most_loss_gap": abs(quality.loss_gap) <= rule.most_loss_gap,
        "least_gradient_cosine": quality.gradient_cosine >= rule.least_gradient_cosine,
    }
    return " and ".join(f"{key}={getattr(rule, key)}" for key, well in kept.items() if not well)


def _trained(model: torch.nn.Module) -> list[Tensor]:
    """Return what is trained. Raises ValueError where its gradients cannot be asked for."""
    if any(_is_reentrant(module) for module in model.modules()):
        raise ValueError(
            "checkpointing with use_reentrant=True gives no gradients but to .grad: set "
            'gradient_checkpointing_kwargs={"use_reentrant": False} to have quality measured'
        )
    return [param for param in model.parameters() if param.requires_grad]


@contextmanager
def _as_it_was(model: torch.nn.Module, tokens: TokenChoice) -> Iterator[None]:
    """Have a model in training, and its modules and what is asked of it as they were afterwards."""
    was_dense, modes = tokens.dense, {each: each.training for each in model.modules()}
    if not model.training:
        model.train()
    try:
        yield
    finally:
        tokens.dense, tokens.recalls = was_dense, None
        for module, training in modes.items():
            module.training = training


def _devices(params: Sequence[Tensor]) -> list[int]:
    return sorted({param.device.index for param in params if param.is_cuda})


def _is_reentrant(module: torch.nn.Module) -> bool:
    function = vars(module).get("_gradient_checkpointing_func")
    named = getattr(function, "keywords", None) or {}
    return bool(getattr(module, "gradient_checkpointing", False)) and bool(
        named.get("use_reentrant", False)
    )


def _means_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Return the same on all ranks, so that none falls back alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    means: list[float] = (total / dist.get_world_size()).tolist()
    return means


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _products(ones: Any, others: Any) -> list[float]:
    """Return the product of two vectors in parts, and the square of each."""
    product = one_square = other_square = 0.0
    for one, other in zip(ones, others, strict=True):
        if one is None or other is None:
            continue
        product += float(torch.sum(one.double() * other.double()))
        one_square += float(one.double().square().sum())
        other_square += float(other.double().square().sum())
    return [product, one_square, other_square]


def _cosine(product: float, one_square: float, other_square: float) -> float:
    length = (one_square * other_square) ** 0.5
    return product / length if length else math.nan
