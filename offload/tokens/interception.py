"""What a model's attention hands to PyTorch's, seen from outside and without a change to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from offload.tokens.causal_lm import CausalLM
from offload.tokens.tiling import in_evaluation

__all__ = ["AttentionCalls", "AttentionInputs", "Calls", "Watch", "attentions_of"]

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_TRIED = 8
"""Tokens of the forward in which attention is looked for."""


@dataclass(frozen=True)
class AttentionInputs:
    """One call of `scaled_dot_product_attention`."""

    query: Tensor
    """[batch, heads, rows, channels], with positions in it."""
    key: Tensor
    """[batch, heads of keys, columns, channels], of fewer heads where groups share them."""
    scale: float


class Calls(TorchFunctionMode):
    """While entered, has `answer` answer each call of PyTorch's functions."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Take the place of a function."""
        return self.answer(function, args, kwargs or {})

    def answer(
        self, function: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any]
    ) -> Any:
        """Return what stands for a call: its own answer, here."""
        return function(*args, **named)


class AttentionCalls(Calls):
    """While entered, has `attend` answer each call of PyTorch's attention, and nothing else."""

    def answer(
        self, function: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any]
    ) -> Any:
        """Take the place of attention, and let everything else through."""
        if function is F.scaled_dot_product_attention:
            return self.attend(dict(zip(_NAMES, args, strict=False)) | dict(named))
        return super().answer(function, args, named)

    def attend(self, given: dict[str, Any]) -> Any:
        """Return what stands for a call with these arguments, by name: its own answer, here."""
        return F.scaled_dot_product_attention(**given)


class Watch(AttentionCalls):
    """While entered, notes what each call of PyTorch's attention is given.

    With `skip` it returns zeros in its place: where only queries and keys are of interest.
    """

    def __init__(self, *, skip: bool) -> None:
        super().__init__()
        self.seen: list[AttentionInputs] = []
        self._skip = skip

    def attend(self, given: dict[str, Any]) -> Any:
        """Note the call."""
        query, key, value = given["query"], given["key"], given["value"]
        scale = given.get("scale")
        self.seen.append(
            AttentionInputs(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
        )
        if not self._skip:
            return super().attend(given)
        return query.new_zeros(*query.shape[:-1], value.shape[-1])


@torch.no_grad()
def attentions_of(model: CausalLM, layers: nn.ModuleList) -> Iterator[nn.Module | None]:
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
