"""LeMo's token elimination for causal language models of Hugging Face's, on top of exact mode."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from offload.tokens.biased_columns import BiasedColumns
from offload.tokens.causal_lm import causal_lm_of, layers_of, perceptrons_of
from offload.tokens.choice import TokenChoice
from offload.tokens.exact import ExactTokens
from offload.tokens.interception import attentions_of
from offload.tokens.predictor import BlockPredictor
from offload.tokens.predictor_file import load_predictors
from perfmodel.token_plan import SparsityRule

__all__ = ["SparseTokens"]

_ASKED = ("input_ids", "labels", "shift_labels", "ignore_index", "attention_mask", "position_ids")


class SparseTokens(TokenChoice):
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
        layers = layers_of(self.model)
        self._asked = rule or SparsityRule()
        super().__init__(
            self.model.whole,
            self._asked.of_layers(len(layers)),
            len(layers),
            gradient_only=gradient_only,
        )
        self._biased: list[BiasedColumns] = []
        self._names = self.model.names()
        # Before exact mode's, which takes labels away.
        self._hooks += [
            self.model.whole.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.whole.register_forward_hook(self._end, always_call=True),
        ]
        self.exact: ExactTokens | None = None
        try:
            attentions = list(attentions_of(self.model, layers))
            self._predictors = self._read_predictors(attentions)
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
        if beyond := sorted(found.keys() - range(len(attentions))):
            raise ValueError(
                f"{rule.predictor}: has predictors of layers {beyond}, and the model has "
                f"{len(attentions)} layers: train one for it (offload tokens train-predictor)"
            )
        # Layers without attention, of a model that mixes kinds, leave nothing out.
        sparse = {
            n
            for n, attention in enumerate(attentions)
            if attention is not None and not rule.is_dense(n)
        }
        if missing := sorted(sparse - found.keys()):
            raise ValueError(f"{rule.predictor}: has no predictors of layers {missing}")
        for number, attention in enumerate(attentions):
            if number in found and attention is not None:
                found[number] = found[number].to(next(attention.parameters()).device).eval()
        return found

    def _put_in(self, layers: nn.ModuleList, attentions: Sequence[nn.Module | None]) -> None:
        """Put attention modules, and perceptrons where asked, to what is kept alone."""
        rule = self.rule
        chosen = rule.sparse_mlp or rule.biased_mlp_columns is not None
        perceptrons = set(perceptrons_of(self.model)) if chosen else set()
        for number, attention in enumerate(attentions):
            if rule.is_dense(number):
                continue
            if attention is None:
                self._require_schedule(number)
                continue
            own = [each for each in layers[number].children() if each in perceptrons]
            if rule.biased_mlp_columns is not None:
                tile, share = int(self.model.config.hidden_size), rule.biased_mlp_columns
                self._biased += [
                    BiasedColumns(each, share, tile_tokens=tile, active=self._is_active)
                    for each in own
                ]
            self.take_out_of(number, attention, own if rule.sparse_mlp else ())
        if not self._eliminating:
            warnings.warn(
                f"no layer of {len(layers)} leaves tokens out by this rule: give ratios for each",
                RuntimeWarning,
                stacklevel=4,
            )
        elif chosen and not (self._following or self._biased):
            asked = "sparse_mlp=True" if rule.sparse_mlp else "biased_mlp_columns"
            raise ValueError(
                f"{asked}, and no perceptron of {type(self.model.whole).__name__} stands "
                "by itself in its layer: leave it out"
            )

    def _require_schedule(self, number: int) -> None:
        """Raise ValueError where a layer was named whose attention is of another kind."""
        if self._asked.ratios is not None or self._asked.thresholds is not None:
            raise ValueError(
                f"layer {number} has no attention of PyTorch's to take tokens out of: give it a "
                "ratio of 1, or a threshold below 0"
            )

    def close(self) -> None:
        """Leave the model as it was. Idempotent."""
        super().close()
        for one in self._biased:
            one.close()
        if self.exact is not None:
            self.exact.close()

    def _begin(self, module: nn.Module, inputs: Any, named: Any) -> Any:
        given = dict(zip(self._names, inputs, strict=False)) | named
        asked = {key: given.get(key) for key in _ASKED}
        if not self._begin_pass(asked, training=module.training):
            return None
        # Of the kept tokens alone a cache would hold keys; in training there is none to be read.
        return (), given | ({"use_cache": False} if "use_cache" in self._names else {})
