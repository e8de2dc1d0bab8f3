"""Which blocks of tokens each layer of a model keeps in the forwards of a run, step by step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from offload.tokens.bounds import bounds_of
from offload.tokens.elimination import Eliminating, Following, Look, score_of
from offload.tokens.gradient_only import GradientOnly, GradientOnlyFollowing
from offload.tokens.passes import Pass, Passes, in_backward
from offload.tokens.predictor import BlockPredictor, block_means
from offload.tokens.selection import Kept, choose_by_share, choose_by_threshold, kept_of
from perfmodel.token_plan import SparsityRule

__all__ = ["TokenChoice"]


class TokenChoice:
    """Has attention modules keep what a rule says, in forwards in training, until `close()`d.

    Steps are counted as an optimizer of the model's parameters takes them, unless somebody else is
    asked (`follow`).
    """

    def __init__(
        self, model: nn.Module, rule: SparsityRule, layers: int, *, gradient_only: bool
    ) -> None:
        if gradient_only and rule.group_tokens is not None:
            raise ValueError(
                f"group_tokens={rule.group_tokens} is for a forward that leaves tokens out, and "
                "here it is over all of them: leave it out"
            )
        self.rule = rule
        self.dense: bool | None = None
        """Set to have all tokens take part, or not, whatever the step."""
        self.fallen_back = False
        """Whether all take part from now on, since the loss was too far from a dense one's."""
        self.kept_shares: list[float | None] = [None] * layers
        """Of the tokens, in each layer's last forward; None: all, always."""
        self.recalls: list[float | None] | None = None
        """Set to a list to have each layer's next forward say how many of the blocks it keeps that
        scores of all tokens would keep, of those; as costly as its attention."""
        self.scores: list[list[float] | None] | None = None
        """Set to a list to have each layer's next forward say what its blocks' scores were, those
        of all sequences behind each other."""
        self._gradient_only = gradient_only
        self._eliminating: list[Eliminating] = []
        self._following: list[Following] = []
        self._predictors: Mapping[int, BlockPredictor] = {}
        self._counted = 0
        self._count: Callable[[], int] | None = None
        self._model = weakref.ref(model)
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._passes = Passes(model)
        stepped = weakref.WeakMethod(self._stepped)  # all optimizers' hook outlives a model

        def step(*given: Any) -> None:
            own = stepped()
            if own is not None:
                own(*given)

        self._hooks: list[Any] = [register_optimizer_step_post_hook(step)]

    def take_out_of(
        self, number: int, attention: nn.Module, perceptrons: Iterable[nn.Module] = ()
    ) -> None:
        """Have a layer's attention, and perceptrons, see what is kept alone. Raises ValueError."""
        found: Eliminating
        if self._gradient_only:
            found = GradientOnly(attention, number, self._choose, active=self._is_active)
        else:
            near = self.rule.group_tokens
            found = Eliminating(
                attention, number, self._choose, active=self._is_active, group_tokens=near
            )
        self._eliminating.append(found)
        follow = GradientOnlyFollowing if self._gradient_only else Following
        self._following += [follow(each, found) for each in perceptrons]

    @property
    def sparse_layers(self) -> int:
        """How many layers leave tokens out."""
        return len(self._eliminating)

    @property
    def kept_share(self) -> float:
        """How much of the tokens the layers' last forwards kept, all layers together."""
        shares = [1.0 if share is None else share for share in self.kept_shares]
        return sum(shares) / len(shares)

    @property
    def is_dense(self) -> bool:
        """Whether all tokens take part in the next forward."""
        if self.dense is not None:
            return self.dense
        return self.fallen_back or self.rule.is_dense_step(self.step)

    @property
    def step(self) -> int:
        """The number of the step under way, from 0."""
        return self._counted if self._count is None else self._count()

    def follow(self, count: Callable[[], int]) -> None:
        """Have `count` say from now on how many steps were taken: a run that goes on knows."""
        self._count = count

    def carrying(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """Return what to hand to `torch.utils.checkpoint` in place of `layer`, in this forward."""
        return self._passes.carrying(layer)

    def close(self) -> None:
        """Leave the model as it was. Idempotent."""
        for one in self._eliminating:
            one.close()
        for other in self._following:
            other.close()
        for hook in self._hooks:
            hook.remove()
        self._passes.close()

    def _stepped(self, optimizer: torch.optim.Optimizer, _args: Any, _named: Any) -> None:
        if (self._optimizer is None or self._optimizer() is None) and self._trains(optimizer):
            self._optimizer = weakref.ref(optimizer)
        # Of several that train a model one is counted.
        if self._optimizer is not None and self._optimizer() is optimizer:
            self._counted += 1

    def _trains(self, optimizer: torch.optim.Optimizer) -> bool:
        """Say whether it has a parameter of the model, as the model is by now."""
        model = self._model()
        own = {id(param) for param in model.parameters()} if model is not None else set()
        return any(id(each) in own for group in optimizer.param_groups for each in group["params"])

    # ---- forwards ----------------------------------------------------------------------------

    def _begin_pass(self, given: Mapping[str, Any], *, training: bool) -> bool:
        """Have a forward under way; returns whether tokens may be left out of it."""
        if not training or not torch.is_grad_enabled():
            self._passes.begin(None)
            return False
        own = Pass(self.is_dense, given)
        self._passes.begin(own)
        for each in self._eliminating:
            each.has_run = False
        if own.dense:
            self.kept_shares = [None if share is None else 1.0 for share in self.kept_shares]
        return True

    def _end(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._passes.end()

    def _is_active(self) -> bool:
        model, own = self._model(), self._passes.current()
        # One that was interrupted still seems to be under way.
        trains = model is not None and model.training
        return trains and own is not None and not own.dense

    def _choose(self, look: Look) -> Kept | None:
        own = self._passes.current()
        if own is None or own.dense:
            return None
        if in_backward():  # what was kept then; nothing is not stored
            return own.kept.get(look.layer)
        kept = self._fresh(look, own)
        self.kept_shares[look.layer] = 1.0 if kept is None else kept.share
        if kept is not None:
            own.kept[look.layer] = kept
            if self.recalls is not None:
                self.recalls[look.layer] = self._recall(look, kept)
        return kept

    def _fresh(self, look: Look, own: Pass) -> Kept | None:
        """Choose what is kept of a layer; None: all of a sequence that is too short."""
        batch, tokens = look.hidden.shape[:2]
        rule = self.rule
        if tokens <= rule.always_tokens:
            return None
        if own.bounds is None:
            own.bounds = bounds_of(own.given, rule, batch, tokens)
        always, never = own.bounds
        scores = self._foretold(look)
        if self.scores is not None:
            self.scores[look.layer] = [one for each in scores for one in each]
        out = never.tolist()
        return kept_of(
            [self._chosen_of(*each, look.layer) for each in zip(scores, out, strict=True)],
            scores,
            always=always.tolist(),
            never=out,
            tokens=tokens,
            block_tokens=rule.block_tokens,
            device=look.hidden.device,
        )

    def _foretold(self, look: Look) -> list[list[float]]:
        """Return scores by what is cheap: a predictor's, or of means."""
        predictor = self._predictors.get(look.layer)
        if predictor is None:
            return self._scores(look, self.rule.pool_tokens)
        size, seen = self.rule.block_tokens, look.may_look
        if seen is not None:
            whole = look.hidden.shape[1] // size
            seen = seen[:, : whole * size, : whole * size]
            seen = seen.reshape(-1, whole, size, whole, size).any(4).any(2)
        scores = block_means(predictor(look.hidden), causal=self.rule.causal, may_look=seen)
        short = look.hidden.shape[1] % self.rule.block_tokens > 0  # the last, which has none
        found: list[list[float]] = torch.nn.functional.pad(scores, (0, int(short))).tolist()
        return found

    def _recall(self, look: Look, kept: Kept) -> float | None:
        """Say how many of the best blocks are kept, of those that are chosen; None: there are none.

        Those that always or never stay count in neither. By thresholds the best are as many as were
        chosen: they are scores of means, and all tokens' are of another size.
        """
        own = self._passes.current()
        assert own is not None
        assert own.bounds is not None
        always, never = own.bounds
        fixed = (always | never).tolist()  # whatever their scores
        scores = self._scores(look, pool_tokens=1)
        found = wanted = 0
        given = zip(scores, kept.blocks, fixed, never.tolist(), strict=True)
        for each, blocks, out, padding in given:
            chosen = {n for n in blocks if not out[n]}
            if self.rule.thresholds is not None:
                ranked = sorted(range(len(each)), key=each.__getitem__, reverse=True)
                best = set([n for n in ranked if not out[n]][: len(chosen)])
            else:
                true = self._chosen_of(each, padding, look.layer)
                best = {n for n, stays in enumerate(true) if stays and not out[n]}
            wanted += len(best)
            found += len(best & chosen)
        return found / wanted if wanted else None

    def _scores(self, look: Look, pool_tokens: int) -> list[list[float]]:
        rule = self.rule
        given: dict[str, Any] = {"block_tokens": rule.block_tokens, "causal": rule.causal}
        found: list[list[float]] = score_of(look, pool_tokens=pool_tokens, **given).tolist()
        return found

    def _chosen_of(self, scores: Sequence[float], never: Sequence[bool], layer: int) -> list[bool]:
        """Choose among the blocks that hold tokens: how much padding there is changes nothing."""
        there = [score for score, out in zip(scores, never, strict=True) if not out]
        chosen = iter(self._chosen(there, layer))
        return [not out and next(chosen) for out in never]

    def _chosen(self, scores: Sequence[float], layer: int) -> list[bool]:
        rule = self.rule
        if rule.thresholds is not None:
            return choose_by_threshold(scores, rule.thresholds[layer])
        assert rule.ratios is not None
        return choose_by_share(scores, rule.ratios[layer], causal=rule.causal)
