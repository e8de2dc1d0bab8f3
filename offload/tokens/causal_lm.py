"""What of a causal language model of Hugging Face's can be cut in segments, found by its own names.

Nothing of transformers is imported: what is asked of a model are the methods that all of them have.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from offload.tokens.tiling import is_position_wise

__all__ = [
    "CausalLM",
    "Finish",
    "causal_lm_of",
    "layers_of",
    "perceptrons_of",
    "require_whole_head",
]

_LOSS = "ForCausalLMLoss"
# Methods of a model within another: PEFT's, then what DistributedDataParallel has.
_WITHIN = ("get_base_model",)


@dataclass(frozen=True)
class Finish:
    """What models do to logits behind their heads, element by element.

    By their configurations' names. What they do else is noticed in the first forward, where the
    loss of a few tokens is compared.
    """

    multiplied: float | None = None
    divided: float | None = None
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return what they make of them."""
        if self.multiplied is not None:
            logits = logits * self.multiplied
        if self.divided is not None:
            logits = logits / self.divided
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


@dataclass(frozen=True)
class CausalLM:
    """A model's parts, as they are in it; it owns them."""

    whole: nn.Module
    """What takes `labels` and returns a loss."""
    decoder: nn.Module
    """What its head sees the first output of."""
    head: nn.Module
    finish: Finish

    @property
    def config(self) -> Any:
        """What the model's text is made by; within a model of more than text, a part of its own."""
        config: Any = self.whole.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    def aux_coefficient(self) -> float:
        """Return by how much experts' own loss counts. Raises ValueError where nobody says."""
        name = "router_aux_loss_coef"
        for owner in (self.whole, self.config):
            if getattr(owner, name, None) is not None:
                return float(getattr(owner, name))
        raise ValueError(
            f"{type(self.whole).__name__} has a loss of its experts and no {name}: tokens.mode can "
            "only be off with it"
        )

    def names(self) -> list[str]:
        """Return the names of what it takes, in their order."""
        return list(inspect.signature(self.whole.forward).parameters)


def causal_lm_of(model: nn.Module) -> CausalLM:
    """Return the parts of a causal language model, also within PEFT's or DDP's.

    Raises ValueError for a model that is none, whose loss is another one, or whose parameters are
    only there while its own forward runs.
    """
    whole: Any = model
    while True:
        inner = next((getattr(whole, name)() for name in _WITHIN if hasattr(whole, name)), None)
        if inner is None and isinstance(whole, nn.parallel.DistributedDataParallel):
            inner = whole.module
        if inner is None or inner is whole:
            break
        whole = inner
    name = type(whole).__name__
    head = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
    decoder = whole.get_decoder() if hasattr(whole, "get_decoder") else None
    if head is None or decoder is None or decoder is whole:
        raise ValueError(
            f"{name} is no causal language model of Hugging Face's: it has no decoder with output "
            "embeddings behind it; tokens.mode can only be off with it"
        )
    loss = getattr(getattr(whole, "loss_function", None), "__name__", "a function without a name")
    if loss != _LOSS:
        raise ValueError(
            f"the loss of {name} is {loss}, and only {_LOSS} is computed in segments: "
            "tokens.mode can only be off with it"
        )
    if "logits_to_keep" not in inspect.signature(whole.forward).parameters:
        raise ValueError(
            f"{name}.forward has no argument logits_to_keep, without which it makes all logits: "
            "tokens.mode can only be off with it"
        )
    found = CausalLM(whole, decoder, head, Finish())
    require_whole_head(found)
    return replace(found, finish=_finish_of(found.config))


def require_whole_head(found: CausalLM) -> None:
    """Raise ValueError for a head that is not there, or whose gradients somebody changes."""
    name = type(found.whole).__name__
    for param in found.head.parameters():
        if hasattr(param, "ds_id") or hasattr(param, "placements"):
            raise ValueError(
                f"the head of {name} is shared over ranks (ZeRO-3 or FSDP2), and is only whole "
                "while its own forward runs: tokens.mode can only be off with it"
            )
        if param._backward_hooks:
            raise ValueError(
                f"a hook of the head of {name} changes its gradient, and would see one of each "
                "segment: remove it, or tokens.mode can only be off"
            )


def _finish_of(config: Any) -> Finish:
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    return Finish(*(getattr(config, name, None) for name in names))


def layers_of(found: CausalLM) -> nn.ModuleList:
    """Return a model's layers: the longest list that its decoder has."""
    lists = [each for each in found.decoder.modules() if isinstance(each, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def perceptrons_of(found: CausalLM) -> Iterator[nn.Module]:
    """Yield what in a model's layers treats every token alone and has more than one map.

    Of each kind one is tried. Experts are left out: what their router sees is counted in the loss.
    """
    channels = int(found.config.hidden_size)
    known: dict[tuple[str, type[nn.Module]], bool] = {}
    for layer in layers_of(found):
        for name, child in layer.named_children():
            kind = (name, type(child))
            if kind not in known:
                known[kind] = _may_be_one(child) and is_position_wise(child, channels)
            if known[kind]:
                yield child


def _may_be_one(module: nn.Module) -> bool:
    params = list(module.parameters())
    maps = sum(param.dim() == 2 for param in params)
    experts = any(param.dim() > 2 for param in params) or any(
        isinstance(each, nn.ModuleList) for each in module.modules()
    )
    return maps > 1 and not experts
