"""Trains predictors beside a frozen model, on what its attention really looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload.tokens.block_attention import BlockAttention
from offload.tokens.causal_lm import causal_lm_of, layers_of
from offload.tokens.elimination import Eliminating, Look
from offload.tokens.interception import attentions_of
from offload.tokens.predictor import BlockPredictor, block_means
from offload.tokens.selection import choose_by_share
from offload.tokens.tiling import in_evaluation
from perfmodel.token_plan import SparsityRule

__all__ = ["PredictorTraining"]

_PRUNINGS = 4
"""As many as LeMo's 400 steps have. A unit of random weights is zero half of the time, so that a
share which fell on and on would take the useful ones too."""


@dataclass
class _Layer:
    predictor: BlockPredictor
    optimizer: torch.optim.Optimizer
    scale: float = 0.0
    """Of its targets, whose size differs by layer: the first one's mean."""
    losses: list[float] = field(default_factory=list)
    kept: int = 0
    wanted: int = 0


class PredictorTraining:
    """Predictors of the layers that `rule` takes blocks out of, until `close()`d.

    The model is neither trained nor changed. Weights are added to by AdamW with a constant rate
    after a few warm-up steps; every `prune_every` steps units that are zero too often go, at first
    over `most_zero` of the time, then 0.05 less each time, four times in all (LeMo's published
    schedule); from then on widths stay.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: SparsityRule,
        *,
        lr: float = 1e-3,
        prune_every: int = 100,
        most_zero: float = 0.8,
    ) -> None:
        self.model = causal_lm_of(model)
        layers = layers_of(self.model)
        self.rule = rule.of_layers(len(layers))
        self._lr, self._prune_every, self._most_zero = lr, prune_every, most_zero
        self._scorer = BlockAttention(rule.block_tokens)
        self._step, self._judging = 0, False
        config = self.model.config
        self.sizes = {
            "channels": int(config.hidden_size),
            "heads": int(config.num_attention_heads),
            "block_tokens": rule.block_tokens,
        }
        self._layers: dict[int, _Layer] = {}
        self._hooks: list[Eliminating] = []
        try:
            self._put_beside(layers)
        except BaseException:
            self.close()
            raise

    def _put_beside(self, layers: nn.ModuleList) -> None:
        """Put a predictor beside each attention that the rule takes blocks out of."""
        for number, attention in enumerate(attentions_of(self.model, layers)):
            if attention is None or self.rule.is_dense(number):
                continue
            param = next(attention.parameters())
            made = BlockPredictor(**self.sizes).to(param.device)
            optimizer = torch.optim.AdamW(made.parameters(), lr=self._lr, betas=(0.9, 0.95))
            self._layers[number] = _Layer(made, optimizer)
            self._hooks.append(Eliminating(attention, number, self._learn))
        if not self._layers:
            raise ValueError("no layer leaves tokens out, so that there is nothing to foretell")

    @property
    def predictors(self) -> dict[int, BlockPredictor]:
        """What was trained, by layer."""
        return {number: each.predictor for number, each in self._layers.items()}

    def train(
        self, batches: Iterable[Mapping[str, Any]], tell: Callable[[float], None] | None = None
    ) -> None:
        """Take a step for each batch; `tell` hears its loss, the mean over layers."""
        self._judging = False
        for each in self._layers.values():
            each.predictor.train()
        for batch in batches:
            self._forward(batch)
            self._step += 1
            times, rest = divmod(self._step, self._prune_every)
            if not rest and times <= _PRUNINGS:
                self._prune(self._most_zero - 0.05 * (times - 1))
            if tell is not None:
                losses = [each.losses[-1] for each in self._layers.values()]
                tell(sum(losses) / len(losses))

    def recalls(self, batches: Iterable[Mapping[str, Any]]) -> dict[int, float]:
        """Return how many of the blocks that true scores keep the predictors keep, by layer.

        Those that always stay are not counted. Raises ValueError where no others are kept.
        """
        self._judging = True
        for each in self._layers.values():
            each.predictor.eval()
            each.kept = each.wanted = 0
        for batch in batches:
            self._forward(batch)
        if not all(each.wanted for each in self._layers.values()):
            raise ValueError(
                "no block is kept but those that always stay, so that there is no recall: give "
                "longer sequences, or a larger ratio"
            )
        return {number: each.kept / each.wanted for number, each in self._layers.items()}

    def close(self) -> None:
        """Leave the model as it was. Idempotent."""
        for each in self._hooks:
            each.close()

    def _forward(self, batch: Mapping[str, Any]) -> None:
        whole = self.model.whole
        with in_evaluation(whole), torch.no_grad():
            asked = {key: each for key, each in batch.items() if key != "labels"}
            whole(**asked, use_cache=False)

    def _learn(self, look: Look) -> None:
        """Take one step of one layer's predictor, or judge it; all tokens go on."""
        layer, tokens = self._layers[look.layer], look.hidden.shape[1]
        if tokens <= self.rule.always_tokens:
            raise ValueError(
                f"a sequence of {tokens} tokens keeps all of its blocks of {self.rule.block_tokens}"
                f": give more than {self.rule.always_tokens}"
            )
        given = look.inputs(1)
        true = self._scorer.pair_scores(
            given.query, given.key, scale=given.scale, ahead=self.rule.causal
        ).to(look.hidden.device)
        whole = tokens // self.rule.block_tokens
        true = true[:, :whole, :whole]
        if self._judging:
            self._judge(layer, look, true)
            return
        counts = true >= 0
        layer.scale = layer.scale or float(true[counts].mean()) or 1.0
        with torch.enable_grad():
            foretold = layer.predictor(look.hidden.float())
            loss = F.smooth_l1_loss(foretold[counts], true[counts] / layer.scale)
            torch.autograd.backward(loss)
        for group in layer.optimizer.param_groups:
            group["lr"] = self._lr * min(1.0, (self._step + 1) / 20)
        layer.optimizer.step()
        layer.optimizer.zero_grad()
        layer.losses.append(float(loss.detach()))

    def _judge(self, layer: _Layer, look: Look, true: Tensor) -> None:
        ratios, causal = self.rule.ratios, self.rule.causal
        assert ratios is not None
        blocks = -(-look.hidden.shape[1] // self.rule.block_tokens)
        by_score = slice(self.rule.first_blocks, blocks - self.rule.last_blocks)
        with torch.no_grad():
            foretold = block_means(layer.predictor(look.hidden.float()), causal=causal)
        for one, other in zip(
            block_means(true, causal=causal).tolist(), foretold.tolist(), strict=True
        ):
            wanted, kept = (
                choose_by_share(each, ratios[look.layer], causal=causal)[by_score]
                for each in (one, other)
            )
            layer.wanted += sum(wanted)
            layer.kept += sum(w and k for w, k in zip(wanted, kept, strict=True))

    def _prune(self, most_zero: float) -> None:
        for each in self._layers.values():
            if each.predictor.prune(most_zero):
                params = each.predictor.parameters()
                each.optimizer = torch.optim.AdamW(params, lr=self._lr, betas=(0.9, 0.95))
