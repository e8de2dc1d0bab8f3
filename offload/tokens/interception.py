"""What a model's attention hands to PyTorch's, seen from outside and without a change to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["AttentionInputs", "Watch"]


@dataclass(frozen=True)
class AttentionInputs:
    """One call of `scaled_dot_product_attention`."""

    query: Tensor
    """[batch, heads, rows, channels], with positions in it."""
    key: Tensor
    """[batch, heads of keys, columns, channels], of fewer heads where groups share them."""
    scale: float


class Watch(TorchFunctionMode):
    """While entered, notes what each call of PyTorch's attention is given.

    With `skip` it returns zeros in its place: where only queries and keys are of interest.
    """

    def __init__(self, *, skip: bool) -> None:
        super().__init__()
        self.seen: list[AttentionInputs] = []
        self._skip = skip

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Note calls of attention, and let everything else through."""
        named = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **named)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | named
        query, key, value = given["query"], given["key"], given["value"]
        scale = given.get("scale")
        self.seen.append(
            AttentionInputs(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
        )
        if not self._skip:
            return function(*args, **named)
        return query.new_zeros(*query.shape[:-1], value.shape[-1])
