"""LeMo's token elimination for causal language models of Hugging Face's, on top of exact mode."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from offload.tokens.bounds import bounds_of
from offload.tokens.causal_lm import causal_lm_of, layers_of, perceptrons_of
from offload.tokens.elimination import Eliminating, Following, Look, score_of
from offload.tokens.exact import ExactTokens
from offload.tokens.gradient_only import GradientOnly, GradientOnlyFollowing
from offload.tokens.interception import attentions_of
from offload.tokens.passes import Pass, Passes, in_backward
from offload.tokens.predictor import BlockPredictor, block_means
from offload.tokens.predictor_file import load_predictors
from offload.tokens.selection import Kept, choose_by_share, choose_by_threshold, kept_of
from perfmodel.token_plan import SparsityRule

__all__ = ["SparseTokens"]

_ASKED = ("input_ids", "labels", "shift_labels", "ignore_index", "attention_mask", "position_ids")


class SparseTokens:
    """Has a causal language model train with blocks of tokens taken out of its attention.

    On top of `ExactTokens`, of which it takes the settings. In training each layer keeps the blocks
    that `rule` says, by scores of the attention's own queries and keys; in evaluation, in steps
    that are to be dense, and once it has `fallen_back`, all. The loss is over all tokens. Steps are
    counted as an optimizer of the model's parameters takes them, unless somebody else is asked
    (`follow`). `gradient_only`: forwards are over all tokens all the same, and gradients go through
    what is kept.

    Raises ValueError for a model whose attention cannot be hooked: at once.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: SparsityRule | None = None,
        *,
        gradient_only: bool = False,
        **exact: Any,
    ) -> None:
        self.model = causal_lm_of(model)
        self._gradient_only = gradient_only
        layers = layers_of(self.model)
        self._asked = rule or SparsityRule()
        self.rule = self._asked.of_layers(len(layers))
        self.dense: bool | None = None
        """Set to have all tokens take part, or not, whatever the step."""
        self.fallen_back = False
        """Whether all take part from now on, since the loss was too far from a dense one's."""
        self._counted = 0
        self._count: Callable[[], int] | None = None
        self.kept_shares: list[float | None] = [None] * len(layers)
        """Of the tokens, in each layer's last forward; None: all, always."""
        self.recalls: list[float | None] | None = None
        """Set to a list to have each layer's next forward say how many of the blocks it keeps that
        scores of all tokens would keep, of those; as costly as its attention."""
        self.scores: list[list[float] | None] | None = None
        """Set to a list to have each layer's next forward say what its blocks' scores were, those
        of all sequences behind each other."""
        self._names = self.model.names()
        self._eliminating: list[Eliminating] = []
        self._following: list[Following] = []
        attentions = list(attentions_of(self.model, layers))
        self._predictors = self._read_predictors(attentions)
        self._params = {id(param) for param in self.model.whole.parameters()}
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._passes = Passes(self.model.whole)
        # Before exact mode's, which takes labels away.
        begin = self.model.whole.register_forward_pre_hook(self._begin, with_kwargs=True)
        end = self.model.whole.register_forward_hook(self._end, always_call=True)
        stepped = weakref.WeakMethod(self._stepped)  # all optimizers' hook outlives a model

        def step(*given: Any) -> None:
            own = stepped()
            if own is not None:
                own(*given)

        self._hooks = [begin, end, register_optimizer_step_post_hook(step)]
        self.exact: ExactTokens | None = None
        try:
            self.exact = ExactTokens(model, **exact)
            self._put_in(layers, attentions)
        except BaseException:
            self.close()
            raise

    def _read_predictors(self, attentions: Sequence[nn.Module | None]) -> dict[int, BlockPredictor]:
        """Return what foretells scores, by layer, where each attention is. Raises ValueError."""
        rule = self.rule
        if rule.predictor is None:
            return {}
        config = self.model.config
        sizes = {"channels": config.hidden_size, "heads": config.num_attention_heads}
        found, made = load_predictors(rule.predictor, block_tokens=rule.block_tokens, **sizes)
        if made.causal != rule.causal:
            raise ValueError(
                f"{rule.predictor}: was trained with causal={made.causal}, and here it is "
                f"{rule.causal}: scores differ"
            )
        sparse = {n for n in range(len(attentions)) if not rule.is_dense(n)}
        if missing := sorted(sparse - found.keys()):
            raise ValueError(f"{rule.predictor}: has no predictors of layers {missing}")
        for number, attention in enumerate(attentions):
            if number in found and attention is not None:
                found[number] = found[number].to(next(attention.parameters()).device).eval()
        return found

    def _put_in(self, layers: nn.ModuleList, attentions: Sequence[nn.Module | None]) -> None:
        """Put attention modules, and perceptrons where asked, to what is kept alone."""
        perceptrons = set(perceptrons_of(self.model)) if self.rule.sparse_mlp else set()
        for number, attention in enumerate(attentions):
            if self.rule.is_dense(number):
                continue
            if attention is None:
                self._require_schedule(number)
                continue
            found = self._around(attention, number)
            self._eliminating.append(found)
            follow = GradientOnlyFollowing if self._gradient_only else Following
            own = [each for each in layers[number].children() if each in perceptrons]
            self._following += [follow(each, found) for each in own]
        if not self._eliminating:
            warnings.warn(
                f"no layer of {len(layers)} leaves tokens out by this rule: give ratios for each",
                RuntimeWarning,
                stacklevel=4,
            )
        elif self.rule.sparse_mlp and not self._following:
            raise ValueError(
                f"sparse_mlp=True, and no perceptron of {type(self.model.whole).__name__} stands "
                "by itself in its layer: leave it out"
            )

    def _around(self, attention: nn.Module, number: int) -> Eliminating:
        if self._gradient_only:
            return GradientOnly(attention, number, self._choose, active=self._is_active)
        near = self.rule.group_tokens
        return Eliminating(
            attention, number, self._choose, active=self._is_active, group_tokens=near
        )

    def _require_schedule(self, number: int) -> None:
        """Raise ValueError where a layer was named whose attention is of another kind."""
        if self._asked.ratios is not None or self._asked.thresholds is not None:
            raise ValueError(
                f"layer {number} has no attention of PyTorch's to take tokens out of: give it a "
                "ratio of 1, or a threshold below 0"
            )

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

    def close(self) -> None:
        """Leave the model as it was. Idempotent."""
        for one in self._eliminating:
            one.close()
        for other in self._following:
            other.close()
        for hook in self._hooks:
            hook.remove()
        self._passes.close()
        if self.exact is not None:
            self.exact.close()

    def _stepped(self, optimizer: torch.optim.Optimizer, _args: Any, _named: Any) -> None:
        first = next((param for group in optimizer.param_groups for param in group["params"]), None)
        if id(first) not in self._params:
            return
        if self._optimizer is None or self._optimizer() is None:
            self._optimizer = weakref.ref(optimizer)
        if self._optimizer() is optimizer:  # of several that train a model one is counted
            self._counted += 1

    # ---- forwards ----------------------------------------------------------------------------

    def _begin(self, module: nn.Module, inputs: Any, named: Any) -> Any:
        if not module.training or not torch.is_grad_enabled():
            self._passes.begin(None)
            return None
        given = dict(zip(self._names, inputs, strict=False)) | named
        own = Pass(self.is_dense, {key: given.get(key) for key in _ASKED})
        self._passes.begin(own)
        if own.dense:
            self.kept_shares = [None if share is None else 1.0 for share in self.kept_shares]
        # Of the kept tokens alone a cache would hold keys; in training there is none to be read.
        return (), given | ({"use_cache": False} if "use_cache" in self._names else {})

    def _end(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._passes.end()

    def _is_active(self) -> bool:
        own = self._passes.current()
        return own is not None and not own.dense

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
        if tokens <= rule.block_tokens * max(1, rule.first_blocks + rule.last_blocks):
            return None
        if own.bounds is None:
            own.bounds = bounds_of(own.given, rule, batch, tokens)
        always, never = own.bounds
        scores = self._foretold(look)
        if self.scores is not None:
            self.scores[look.layer] = [one for each in scores for one in each]
        return kept_of(
            [self._chosen(each, look.layer) for each in scores],
            scores,
            always=always.tolist(),
            never=never.tolist(),
            tokens=tokens,
            block_tokens=rule.block_tokens,
            device=look.hidden.device,
        )

    def _foretold(self, look: Look) -> list[list[float]]:
        """Return scores by what is cheap: a predictor's, or of means."""
        predictor = self._predictors.get(look.layer)
        if predictor is None:
            return self._scores(look, self.rule.pool_tokens)
        scores = block_means(predictor(look.hidden), causal=self.rule.causal)
        short = look.hidden.shape[1] % self.rule.block_tokens > 0  # the last, which has none
        found: list[list[float]] = torch.nn.functional.pad(scores, (0, int(short))).tolist()
        return found

    def _recall(self, look: Look, kept: Kept) -> float:
        scores = self._scores(look, pool_tokens=1)
        found = wanted = 0
        for each, blocks in zip(scores, kept.blocks, strict=True):
            true = {n for n, one in enumerate(self._chosen(each, look.layer)) if one}
            wanted += len(true)
            found += len(true & set(blocks))
        return found / wanted if wanted else 1.0

    def _scores(self, look: Look, pool_tokens: int) -> list[list[float]]:
        rule = self.rule
        given: dict[str, Any] = {"block_tokens": rule.block_tokens, "causal": rule.causal}
        found: list[list[float]] = score_of(look, pool_tokens=pool_tokens, **given).tolist()
        return found

    def _chosen(self, scores: Sequence[float], layer: int) -> list[bool]:
        rule = self.rule
        if rule.thresholds is not None:
            return choose_by_threshold(scores, rule.thresholds[layer])
        assert rule.ratios is not None
        return choose_by_share(scores, rule.ratios[layer], causal=rule.causal)
