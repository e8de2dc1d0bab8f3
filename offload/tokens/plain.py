"""Token elimination for a model of one's own, whose attention modules are named."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offload.tokens.choice import TokenChoice
from perfmodel.token_plan import SparsityRule

__all__ = ["PlainTokens"]

_ASKED = ("attention_mask", "position_ids", "labels")
_IDS = ("input_ids", "tokens")


class PlainTokens(TokenChoice):
    """Has blocks of tokens taken out of `attentions`, one for each layer of `model`, in training.

    An attention takes hidden states [batch, sequence, channels] first, calls PyTorch's
    `scaled_dot_product_attention` once, causally, and returns as much, which is added to the
    residual. Where positions turn its queries and keys it takes them by name, `position_ids`
    [1 or batch, sequence]. With `rule.sparse_mlp`, `perceptrons`, one for each layer, follow. Of
    what the model is given by name, `attention_mask` [batch, sequence], `position_ids` and `labels`
    say which blocks always stay, and so do `input_ids` or `tokens`, else the first whole numbers
    [batch, sequence] given by place, with `rule.keep_token_ids`.

    Layers that are run again in the backward have to be `carrying` their forward. Everything else
    is as in `SparseTokens`, but for the loss, which is the model's own. Raises ValueError for an
    attention that already has a forward of its own, where numbers of modules differ, and for what
    the rule says to a Trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        attentions: Sequence[nn.Module],
        rule: SparsityRule | None = None,
        *,
        perceptrons: Sequence[nn.Module] = (),
        gradient_only: bool = False,
    ) -> None:
        rule = (rule or SparsityRule()).of_layers(len(attentions))
        if rule.sparse_mlp and len(perceptrons) != len(attentions):
            raise ValueError(
                f"sparse_mlp=True, and {len(perceptrons)} perceptrons for {len(attentions)} "
                "attentions: give one for each layer"
            )
        for name in ("predictor", "biased_mlp_columns"):
            if getattr(rule, name) is not None:
                raise ValueError(
                    f"{name}={getattr(rule, name)!r} is for models of Hugging Face's: leave it out"
                )
        if rule.meter_steps:
            raise ValueError(
                f"meter_steps={rule.meter_steps} is for a Trainer: leave it out, and call "
                "offload.tokens.measure_quality between steps"
            )
        super().__init__(model, rule, len(attentions), gradient_only=gradient_only)
        self._hooks += [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        try:
            for number, attention in enumerate(attentions):
                if not rule.is_dense(number):
                    own = [perceptrons[number]] if rule.sparse_mlp else []
                    self.take_out_of(number, attention, own)
        except BaseException:
            self.close()
            raise
        if not self.sparse_layers:
            warnings.warn(
                f"no attention of {len(attentions)} leaves tokens out by this rule: give ratios "
                "for each",
                RuntimeWarning,
                stacklevel=2,
            )

    def _begin(self, module: nn.Module, inputs: Any, named: Any) -> None:
        given = {key: named.get(key) for key in _ASKED}
        if self.rule.keep_token_ids:
            given["input_ids"] = self._ids_of(inputs, named)
        self._begin_pass(given, training=module.training)

    def _ids_of(self, inputs: Sequence[Any], named: dict[str, Any]) -> Tensor:
        for each in (*(named.get(key) for key in _IDS), *inputs):
            if isinstance(each, Tensor) and each.dim() == 2 and _is_whole(each):
                return each
        raise ValueError(
            f"keep_token_ids={self.rule.keep_token_ids!r}, and the model is given no whole numbers "
            f"[batch, sequence] as {' or '.join(_IDS)}, nor by place: name them so, or leave it out"
        )


def _is_whole(numbers: Tensor) -> bool:
    return not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
