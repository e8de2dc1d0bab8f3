"""Finds thresholds for a model from sequences: a profile of its scores, then Algorithm 1."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from offload.tokens.sparse import SparseTokens
from offload.tokens.thresholds import first_thresholds, tune_thresholds
from offload.tokens.tiling import in_evaluation
from perfmodel.token_plan import SparsityRule

__all__ = ["ThresholdTuning", "Tried"]

_NONE_LEFT_OUT = -1.0


@dataclass(frozen=True)
class Tried:
    """What thresholds do to sequences."""

    loss: float
    kept_share: float
    """Of all tokens, in all layers."""


class ThresholdTuning:
    """Thresholds of the layers that `rule` takes blocks out of, until `close()`d.

    Its ratios say which layers those are, and where scores begin. The model is not trained: it runs
    forward on `batches`, which have labels, as it would in training but for dropout, whose noise
    would be taken for what a threshold does. Raises ValueError where no layer leaves tokens out,
    without batches, for one without a loss, and for a rule of thresholds or predictors.
    """

    def __init__(
        self, model: nn.Module, rule: SparsityRule, batches: Sequence[Mapping[str, Any]]
    ) -> None:
        if rule.thresholds is not None:
            raise ValueError("the rule has thresholds already: give ratios, or leave both out")
        if rule.predictor is not None:
            raise ValueError(
                f"predictor={rule.predictor!r} foretells scores of another scale: thresholds are "
                "of means; leave it out"
            )
        if not batches:
            raise ValueError("no batches to tune thresholds on")
        self._batches, self._model = batches, model
        self._tokens = SparseTokens(model, rule)
        try:
            if not self._tokens.sparse_layers:
                raise ValueError("no layer leaves tokens out, so that there is nothing to tune")
            self._begun = self._tokens.rule
            self.dense_loss = self._dense_loss()
            """Of all batches, with all tokens."""
        except BaseException:
            self.close()
            raise

    def profile(self) -> tuple[float, ...]:
        """Return each layer's mean score; a negative one where nothing is left out."""
        self._tokens.rule = self._begun
        layers = len(self._tokens.kept_shares)
        scores: list[list[float]] = [[] for _ in range(layers)]
        for batch in self._batches:
            self._tokens.scores = [None] * layers
            self._forward(batch, dense=False)
            for own, seen in zip(scores, self._tokens.scores, strict=True):
                own += seen or []
        self._tokens.scores = None
        return first_thresholds([own or [_NONE_LEFT_OUT] for own in scores])

    def tried(self, thresholds: Sequence[float]) -> Tried:
        """Return what thresholds do to the batches."""
        self._tokens.rule = replace(self._begun, ratios=None, thresholds=tuple(thresholds))
        shares: list[float] = []
        losses: list[float] = []
        for batch in self._batches:
            losses.append(self._forward(batch, dense=False))
            shares.append(self._tokens.kept_share)
        return Tried(statistics.fmean(losses), statistics.fmean(shares))

    def tune(
        self,
        thresholds: Sequence[float],
        *,
        cost: float,
        rounds: int = 1,
        tell: Callable[[Tried], None] | None = None,
    ) -> tuple[float, ...]:
        """Return thresholds from Algorithm 1; `tell` hears of each that is tried.

        What they climb by: minus the part by which the loss is over the dense one, and minus `cost`
        for each part of the tokens that stays. With 0.1, a loss of 1 % more is worth a tenth of all
        tokens. Raises ValueError for a cost that is not over 0, and where a loss is no number.
        """
        if not 0 < cost < math.inf:
            raise ValueError(f"cost={cost} is not a number over 0")

        def accuracy(given: tuple[float, ...]) -> float:
            found = self.tried(given)
            if tell is not None:
                tell(found)
            return -(found.loss / self.dense_loss - 1) - cost * found.kept_share

        return tune_thresholds(thresholds, accuracy, rounds=rounds, gain=cost)

    def close(self) -> None:
        """Leave the model as it was. Idempotent."""
        self._tokens.close()

    def _dense_loss(self) -> float:
        losses = [self._forward(batch, dense=True) for batch in self._batches]
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of batch {number} with all tokens is {loss}, to which nothing "
                    "compares: give it labels that are not all ignored"
                )
        mean = statistics.fmean(losses)
        if mean <= 0:
            raise ValueError(
                f"the loss of all batches with all tokens is {mean}, and parts of it say nothing: "
                "give others"
            )
        return mean

    def _forward(self, batch: Mapping[str, Any], *, dense: bool) -> float:
        self._tokens.dense = dense
        # Tokens are left out of forwards with gradients alone: those of inputs, which are dropped.
        with _without_noise(self._model, self._tokens.model.whole), torch.enable_grad():
            loss = self._model(**batch).loss
        if loss is None:
            named = ", ".join(batch)
            raise ValueError(f"a batch of {named} gives no loss: give each batch labels")
        return float(loss.detach())


@contextmanager
def _without_noise(model: nn.Module, whole: nn.Module) -> Iterator[None]:
    """Have `whole` run as in training but without dropout; afterwards each module is as it was.

    What is run again in the backward only is so in training, and saves room: it stays there, and
    what it draws is the same in each forward.
    """
    drawing = {param.device.index for param in model.parameters() if param.is_cuda}
    with in_evaluation(model), torch.random.fork_rng(sorted(drawing)):
        for each in model.modules():
            each.training = each is whole or bool(getattr(each, "gradient_checkpointing", False))
        yield
