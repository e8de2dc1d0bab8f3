"""Token elimination for a model of one's own, whose attention modules are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from offload.tokens.choice import TokenChoice
from perfmodel.token_plan import SparsityRule

__all__ = ["PlainTokens"]

_ASKED = ("attention_mask", "position_ids", "labels")


class PlainTokens(TokenChoice):
    """Has blocks of tokens taken out of `attentions`, one for each layer of `model`, in training.

    An attention takes hidden states [batch, sequence, channels] first, calls PyTorch's
    `scaled_dot_product_attention` once, causally, and returns as much, which is added to the
    residual. Where positions turn its queries and keys it takes them by name, `position_ids`
    [1 or batch, sequence]. With `rule.sparse_mlp`, `perceptrons`, one for each layer, follow. Of
    what the model is given by name, `attention_mask` [batch, sequence], `position_ids` and `labels`
    say which blocks always stay.

    Layers that are run again in the backward have to be `carrying` their forward. Everything else
    is as in `SparseTokens`, but for the loss, which is the model's own. Raises ValueError for an
    attention that already has a forward of its own, and where numbers of modules differ.
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

    def carrying(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """Return what to hand to `torch.utils.checkpoint` in place of `layer`, in this forward."""
        own = self._passes.current()
        if own is None:
            return layer

        def carried(*inputs: Any, **named: Any) -> Any:
            with self._passes.within(own):
                return layer(*inputs, **named)

        return carried

    def _begin(self, module: nn.Module, _inputs: Any, named: Any) -> None:
        self._begin_pass({key: named.get(key) for key in _ASKED}, training=module.training)
