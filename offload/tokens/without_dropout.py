"""A model in training whose dropout drops nothing, so that two forwards of it compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from offload.tokens.interception import Calls

__all__ = ["without_dropout"]

_FUNCTIONS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.dropout_),
)
_SHARES: dict[Callable[..., Any], tuple[str, int]] = {
    F.scaled_dot_product_attention: ("dropout_p", 4),
    F.multi_head_attention_forward: ("dropout_p", 10),
    **dict.fromkeys(_FUNCTIONS, ("p", 1)),
}
"""What drops out, and the name and place of how much of it."""


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Have nothing dropped out by modules of `model`, nor by functions that are called meanwhile.

    Its modules stay in training. What else is drawn at random is.
    """
    # Modules as well, since a GPU's backward may run layers again in a thread of its own.
    shares = {each: each.p for each in model.modules() if _is_dropout(each)}
    try:
        for module in shares:
            module.p = 0.0  # type: ignore[assignment]
        with _NoneDropped():
            yield
    finally:
        for module, share in shares.items():
            module.p = share


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)


class _NoneDropped(Calls):
    """While entered, PyTorch's functions drop nothing: a model asks its own settings how much."""

    def answer(
        self, function: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any]
    ) -> Any:
        """Take the share out of a call that drops, and let everything else through."""
        if function in _SHARES:
            name, place = _SHARES[function]
            if len(args) > place:
                args = [*args[:place], 0.0, *args[place + 1 :]]
            else:
                named = {**named, name: 0.0}
        return super().answer(function, args, named)
