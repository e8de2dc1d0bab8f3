"""LeMo's token elimination for causal language models of Hugging Face's, on top of exact mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from offload.tokens.causal_lm import causal_lm_of, layers_of, perceptrons_of
from offload.tokens.elimination import Eliminating, Following, Look, score_of
from offload.tokens.exact import ExactTokens
from offload.tokens.interception import Watch
from offload.tokens.loss import IGNORED
from offload.tokens.selection import (
    Kept,
    choose_by_share,
    choose_by_threshold,
    kept_of,
)
from offload.tokens.tiling import in_evaluation
from perfmodel.token_plan import SparsityRule

__all__ = ["SparseTokens"]

_TRIED = 8


class SparseTokens:
    """Has a causal language model train with blocks of tokens taken out of its attention.

    On top of `ExactTokens`, of which it takes the settings. In training each layer keeps the blocks
    that `rule` says, by scores of the attention's own queries and keys; in evaluation, in steps
    that are to be dense, and once it has `fallen_back`, all. The loss is over all tokens. Steps are
    counted as an optimizer of the model's parameters takes them, unless somebody else is asked
    (`follow`).

    Raises ValueError for a model whose attention cannot be hooked: at once.
    """

    def __init__(self, model: nn.Module, rule: SparsityRule | None = None, **exact: Any) -> None:
        self.model = causal_lm_of(model)
        layers = layers_of(self.model)
        self.rule = (rule or SparsityRule()).of_layers(len(layers))
        self.dense: bool | None = None
        """Set to have all tokens take part, or not, whatever the step."""
        self.fallen_back = False
        """Whether all take part from now on, since the loss was too far from a dense one's."""
        self._counted = 0
        self._count: Callable[[], int] | None = None
        self.kept_shares: list[float | None] = [None] * len(layers)
        """Of the tokens, in each layer's last forward; None: all, always."""
        self._given: dict[str, Any] = {}
        self._always: list[list[bool]] | None = None
        self._never: list[list[bool]] = []
        self._names = self.model.names()
        self._eliminating: list[Eliminating] = []
        self._following: list[Following] = []
        attentions = list(attentions_of(self.model, layers))
        self._params = {id(param) for param in self.model.whole.parameters()}
        # Before exact mode's, which takes labels away.
        begin = self.model.whole.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._hooks = [begin, register_optimizer_step_post_hook(self._stepped)]
        self.exact: ExactTokens | None = None
        try:
            self.exact = ExactTokens(model, **exact)
            self._put_in(layers, attentions)
        except BaseException:
            self.close()
            raise

    def _put_in(self, layers: nn.ModuleList, attentions: Sequence[nn.Module | None]) -> None:
        """Put attention modules, and perceptrons where asked, to what is kept alone."""
        perceptrons = set(perceptrons_of(self.model)) if self.rule.sparse_mlp else set()
        for number, attention in enumerate(attentions):
            if self.rule.is_dense(number) or attention is None:
                continue
            near = {"group_tokens": self.rule.group_tokens}
            found = Eliminating(attention, number, self._choose, **near)
            self._eliminating.append(found)
            own = [each for each in layers[number].children() if each in perceptrons]
            self._following += [Following(each, found) for each in own]

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
        if self.exact is not None:
            self.exact.close()

    def _stepped(self, optimizer: torch.optim.Optimizer, _args: Any, _named: Any) -> None:
        first = next((param for group in optimizer.param_groups for param in group["params"]), None)
        if id(first) in self._params:
            self._counted += 1

    # ---- what is always kept -----------------------------------------------------------------

    def _begin(self, module: nn.Module, inputs: Any, named: Any) -> Any:
        given = dict(zip(self._names, inputs, strict=False)) | named
        self._always = None
        if not module.training:
            return None
        keys = ("input_ids", "labels", "attention_mask", "position_ids")
        self._given = {key: given.get(key) for key in keys}
        # Of the kept tokens alone a cache would hold keys; in training there is none to be read.
        return (), given | ({"use_cache": False} if "use_cache" in self._names else {})

    def _must(self, batch: int, tokens: int) -> tuple[list[list[bool]], list[list[bool]]]:
        """Return which blocks are always kept, and which never, [batch, blocks] each."""
        if self._always is None or len(self._always) != batch:
            always, never = bounds_of(self._given, self.rule, batch, tokens)
            self._always, self._never = always.tolist(), never.tolist()
        return self._always, self._never

    # ---- what is kept --------------------------------------------------------------------------

    def _choose(self, look: Look) -> Kept | None:
        if self.is_dense:
            return None
        batch, tokens = look.hidden.shape[:2]
        rule = self.rule
        if tokens <= rule.block_tokens * (rule.first_blocks + rule.last_blocks):
            return None
        scores = score_of(
            look,
            pool_tokens=rule.pool_tokens,
            block_tokens=rule.block_tokens,
            causal=rule.causal,
        ).tolist()
        chosen = [self._chosen(each, look.layer) for each in scores]
        always, never = self._must(batch, tokens)
        kept = kept_of(
            chosen,
            scores,
            always=always,
            never=never,
            tokens=tokens,
            block_tokens=rule.block_tokens,
            device=look.hidden.device,
        )
        self.kept_shares[look.layer] = kept.share
        return kept

    def _chosen(self, scores: Sequence[float], layer: int) -> list[bool]:
        rule = self.rule
        if rule.thresholds is not None:
            return choose_by_threshold(scores, rule.thresholds[layer])
        assert rule.ratios is not None
        return choose_by_share(scores, rule.ratios[layer], causal=rule.causal)


def bounds_of(
    given: dict[str, Any], rule: SparsityRule, batch: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Return which blocks are always kept, and which hold padding alone: bool, [batch, blocks]."""
    blocks = math.ceil(tokens / rule.block_tokens)
    mask = given.get("attention_mask")
    there = torch.ones(batch, tokens, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == (batch, tokens):
        there = mask.cpu().bool()
    always = torch.zeros(batch, blocks, dtype=torch.bool)
    filled = _by_block(there, rule.block_tokens)
    for index in range(batch):
        own = filled[index].nonzero().flatten().tolist()
        always[index, own[: rule.first_blocks]] = True
        always[index, own[len(own) - rule.last_blocks :] if rule.last_blocks else []] = True
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape == (batch, tokens) and rule.first_blocks:
        begins = _by_block((positions.cpu() == 0) & there, rule.block_tokens)
        for after in range(rule.first_blocks):
            always[:, after:] |= begins[:, : blocks - after]
    labels = given.get("labels")
    if rule.keep_labels and isinstance(labels, Tensor):
        counts = labels.cpu() != IGNORED
        if bool((~counts & there).any()):
            always |= _by_block(counts, rule.block_tokens)
    ids = given.get("input_ids")
    if rule.keep_token_ids and isinstance(ids, Tensor):
        wanted = torch.tensor(rule.keep_token_ids)
        always |= _by_block(torch.isin(ids.cpu(), wanted), rule.block_tokens)
    return always & filled, ~filled


def _by_block(tokens: Tensor, block_tokens: int) -> Tensor:
    """Say of each block whether it holds one of the tokens that are so."""
    over = -tokens.shape[1] % block_tokens
    padded = torch.nn.functional.pad(tokens, (0, over))
    return padded.view(len(tokens), -1, block_tokens).any(-1)


@torch.no_grad()
def attentions_of(model: Any, layers: nn.ModuleList) -> Iterator[nn.Module | None]:
    """Yield each layer's attention module, None where a layer has another kind of it.

    Found by which child calls PyTorch's attention in a forward of a few tokens. Raises ValueError
    where none does.
    """
    found: dict[nn.Module, int] = {}
    watch = Watch(skip=False)
    hooks: list[Any] = []
    before: list[int] = []

    def enter(_module: nn.Module, _inputs: Any) -> None:
        before.append(len(watch.seen))

    def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
        found[module] = len(watch.seen) - before.pop()

    children = [child for layer in layers for child in layer.children()]
    for child in children:
        hooks += [child.register_forward_pre_hook(enter), child.register_forward_hook(leave)]
    params = next(model.whole.parameters())
    ids = torch.zeros(1, _TRIED, dtype=torch.long, device=params.device)
    try:
        with in_evaluation(model.whole), watch:
            model.whole(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not any(found.values()):
        raise ValueError(
            f"no layer of {type(model.whole).__name__} has a module that calls PyTorch's "
            "scaled_dot_product_attention: load the model with attn_implementation='sdpa', or set "
            "tokens.mode to exact"
        )
    for layer in layers:
        calling = [child for child in layer.children() if found.get(child) == 1]
        yield calling[0] if len(calling) == 1 else None
