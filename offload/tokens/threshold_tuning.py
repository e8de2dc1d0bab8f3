"""Finds thresholds for a model from sequences: a profile of its scores, then Algorithm 1."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from offload.tokens.sparse import SparseTokens
from offload.tokens.thresholds import first_thresholds, tune_thresholds
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
    forward on `batches`, which have labels, as it would in training. Raises ValueError where no
    layer leaves tokens out, without batches, and for a rule that has thresholds already.
    """

    def __init__(
        self, model: nn.Module, rule: SparsityRule, batches: Sequence[Mapping[str, Any]]
    ) -> None:
        if rule.thresholds is not None:
            raise ValueError("the rule has thresholds already: give ratios, or leave both out")
        if not batches:
            raise ValueError("no batches to tune thresholds on")
        self._batches = batches
        self._model, self._was_training = model, model.training
        self._tokens = SparseTokens(model, rule)
        if not self._tokens.sparse_layers:
            self.close()
            raise ValueError("no layer leaves tokens out, so that there is nothing to tune")
        self._begun = self._tokens.rule
        self.dense_loss = self._loss(dense=True)
        """Of all batches, with all tokens."""

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
        tokens.
        """

        def accuracy(given: tuple[float, ...]) -> float:
            found = self.tried(given)
            if tell is not None:
                tell(found)
            return -(found.loss / self.dense_loss - 1) - cost * found.kept_share

        return tune_thresholds(thresholds, accuracy, rounds=rounds, gain=cost)

    def close(self) -> None:
        """Leave the model as it was. Idempotent."""
        self._tokens.close()
        self._model.train(self._was_training)

    def _loss(self, *, dense: bool) -> float:
        return statistics.fmean(self._forward(batch, dense=dense) for batch in self._batches)

    def _forward(self, batch: Mapping[str, Any], *, dense: bool) -> float:
        self._tokens.dense = dense
        self._model.train()
        # Tokens are left out of forwards with gradients alone: those of inputs, which are dropped.
        with torch.enable_grad():
            loss = self._model(**batch).loss
        return float(loss.detach())
