"""One attention module that runs over the tokens that matter to it, and passes the others by."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload.tokens.interception import AttentionInputs, Watch
from offload.tokens.kept_rows import KeptRows, take_rows
from offload.tokens.scores import block_scores, pooled
from offload.tokens.selection import Kept
from offload.tokens.shifted import Shifted
from offload.tokens.tiling import in_evaluation

__all__ = ["Choose", "Eliminating", "Following", "Look", "cut", "score_of"]

# Of what an attention takes besides hidden states: what there is one of for every token.
_BY_TOKEN = {"position_ids": 1, "cache_position": 0, "position_embeddings": 1}
_MASK = "attention_mask"
_OF_THE_LOSS = ("labels", "shift_labels")  # which go along with everything else, and to no end
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")


@dataclass(frozen=True)
class Look:
    """What a choice of blocks may be made from. The owner's for as long as it chooses."""

    layer: int
    hidden: Tensor
    """[batch, sequence, channels], as attention gets it."""
    inputs: Callable[[int], AttentionInputs]
    """Queries and keys of means of so many tokens each; 1: of all tokens."""
    may_look: Tensor | None
    """[batch, sequence, sequence]: which tokens see which, where more than causality says."""


Choose = Callable[[Look], Kept | None]
"""Returns what is kept of a layer, or None for all."""


class Eliminating:
    """Has an attention module see only what `choose` keeps of each sequence, until `close()`d.

    Kept tokens attend to kept tokens alone, at their own positions; the others' residual passes by
    unchanged. Each sequence of a batch runs by itself, so that none depends on another. `choose` is
    asked in every forward, those that run again too, while `active` says so.

    The module keeps its place and name: only its attribute `forward` is another one meanwhile.
    Raises ValueError where it already has one of its own, and in a forward for what it is given by
    token and this cannot take apart.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: int,
        choose: Choose,
        *,
        active: Callable[[], bool] = lambda: True,
        group_tokens: int | None = None,
    ) -> None:
        if "forward" in vars(module):
            raise ValueError(
                f"{type(module).__name__} already has a forward of its own, by another library's "
                "hook say: remove that, or leave tokens.mode at exact"
            )
        self._module, self._layer, self._choose = module, layer, choose
        self._active, self._group_tokens = active, group_tokens
        self.kept: Kept | None = None
        """Of the forward that ran last, or runs again; None: all."""
        self.has_run = True
        """Set to False at the beginning of a forward, for who follows and may come too early."""
        self._whole = module.forward
        module.forward = self._forward

    def close(self) -> None:
        """Have it see every token again. Idempotent."""
        if vars(self._module).get("forward") == self._forward:
            del self._module.forward

    def _forward(self, *inputs: Any, **named: Any) -> Any:
        self.kept, self.has_run = None, True
        if not self.is_active():
            return self._whole(*inputs, **named)
        hidden, rest, named = _hidden_of(inputs, named)
        with torch.no_grad():
            kept = self._choose(self._look(hidden.detach(), named))
        if kept is None or (kept.share == 1 and self._group_tokens is None):
            return self._whole(hidden, *rest, **named)
        self.kept = kept
        return self._run_kept(hidden, rest, named, kept)

    def is_active(self) -> bool:
        """Say whether tokens are left out of the forward that runs, or runs again."""
        return self._active()

    def _run_kept(
        self, hidden: Tensor, rest: tuple[Any, ...], named: dict[str, Any], kept: Kept
    ) -> Any:
        near = nullcontext() if self._group_tokens is None else Shifted(self._group_tokens)
        with near:
            found = [
                self._whole(take_rows(hidden[n : n + 1], rows), *rest, **cut(named, kept, n))
                for n, rows in enumerate(kept.rows)
            ]
        return _passing_by(self._module, found, kept)

    def _look(self, hidden: Tensor, named: dict[str, Any]) -> Look:
        mask = named.get(_MASK)
        may_look = None
        if isinstance(mask, Tensor) and mask.dim() == 4:
            seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
            may_look = seen.expand(hidden.shape[0], hidden.shape[1], -1)

        def inputs(tokens: int) -> AttentionInputs:
            return self._inputs(hidden, named, tokens)

        return Look(self._layer, hidden, inputs, may_look)

    def _inputs(self, hidden: Tensor, named: dict[str, Any], tokens: int) -> AttentionInputs:
        """Return queries and keys of means of `tokens` tokens, each at its middle's position."""
        length = hidden.shape[1]
        middles = torch.arange(0, length, tokens, device=hidden.device) + tokens // 2
        at = middles.clamp(max=length - 1)
        given = {key: None if key == _MASK else value for key, value in named.items()}
        means = pooled(hidden, tokens) if tokens > 1 else hidden
        with Watch(skip=True) as watch, in_evaluation(self._module), torch.no_grad():
            self._whole(means, **cut(given, Kept((at,), length, ()), None))
        if len(watch.seen) != 1:
            raise _without_attention(self._module, len(watch.seen))
        found: AttentionInputs = watch.seen[0]
        return found


class Following:
    """Has a perceptron run for the tokens that its layer's attention kept, until `close()`d.

    The others' residual passes by. May stand around another's forward of the module's own.
    """

    def __init__(self, module: nn.Module, attention: Eliminating) -> None:
        self._module, self._attention = module, attention
        self._before = vars(module).get("forward")
        self._whole = module.forward
        module.forward = self._forward

    def close(self) -> None:
        """Have it run for every token again. Idempotent."""
        if vars(self._module).get("forward") == self._forward:
            del self._module.forward
            if self._before is not None:
                self._module.forward = self._before

    def _forward(self, *inputs: Any, **named: Any) -> Any:
        if not self._attention.has_run and self._attention.is_active():
            raise ValueError(
                f"{type(self._module).__name__} runs before the attention of its layer, so that "
                "nobody knows which tokens stay: set sparse_mlp=False"
            )
        kept = self._attention.kept
        x = inputs[0] if inputs else None
        if (
            kept is None
            or not isinstance(x, Tensor)
            or x.shape[:2] != (len(kept.rows), kept.tokens)
        ):
            return self._whole(*inputs, **named)
        if named or len(inputs) > 1:
            raise ValueError(
                f"{type(self._module).__name__} was given {len(inputs) + len(named)} arguments, of "
                "which nobody knows whether they are by token: set sparse_mlp=False"
            )
        return self._run_kept(x, kept)

    def _run_kept(self, x: Tensor, kept: Kept) -> Any:
        found = [self._whole(take_rows(x[n : n + 1], rows)) for n, rows in enumerate(kept.rows)]
        return _passing_by(self._module, found, kept)


def _passing_by(module: nn.Module, found: list[Any], kept: Kept) -> Any:
    """Return what a module gave for kept tokens, so that a residual takes it in row by row."""
    first = [each if isinstance(each, Tensor) else each[0] for each in found]
    rows: Any = KeptRows(first, kept)
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        rows = rows.padded()  # for whoever looks at a module's output
    return rows if isinstance(found[0], Tensor) else (rows, *found[0][1:])


def _without_attention(module: nn.Module, calls: int) -> ValueError:
    return ValueError(
        f"{type(module).__name__} calls PyTorch's scaled_dot_product_attention {calls} times "
        "and not once, so that tokens cannot be taken out of it: load the model with "
        "attn_implementation='sdpa', or set tokens.mode to exact"
    )


def score_of(look: Look, *, pool_tokens: int, block_tokens: int, causal: bool) -> Tensor:
    """Return blocks' scores from queries and keys of means of `pool_tokens`; 1: of all tokens."""
    inputs = look.inputs(pool_tokens)
    may_look = look.may_look
    if may_look is not None and pool_tokens > 1:
        length = look.hidden.shape[1]
        at = torch.arange(0, length, pool_tokens, device=look.hidden.device)
        may_look = may_look[:, at][:, :, at]
    return block_scores(
        inputs.query,
        inputs.key,
        scale=inputs.scale,
        block_tokens=block_tokens // pool_tokens,
        causal=causal,
        may_look=may_look,
    )


def _hidden_of(
    inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return hidden states, what else is given by place, and by name. Raises ValueError."""
    if inputs:
        hidden, *others = inputs
    else:
        named = dict(named)
        hidden, others = named.pop("hidden_states", None), []
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise ValueError("attention was not given hidden states [batch, sequence, channels] first")
    if any(each is not None for each in others):
        raise ValueError(
            f"attention was given {len(others)} more arguments by place, of which nobody knows "
            "whether they are by token: leave tokens.mode at exact with this model"
        )
    return hidden, tuple(others), named


def cut(named: dict[str, Any], kept: Kept, number: int | None) -> dict[str, Any]:
    """Return what attention is given besides hidden states, of the kept tokens of one sequence.

    `number` None: of all sequences, which keep the same.
    """
    found = dict(named)
    rows = kept.rows[number or 0]
    for key, value in named.items():
        if key in _CACHES and value is not None:
            raise ValueError(
                f"attention was given {key}, which would hold kept tokens alone: "
                "set use_cache=False while training"
            )
        if key == _MASK:
            found[key] = _cut_mask(value, kept.tokens, rows, number)
        elif key in _BY_TOKEN:
            parts = value if isinstance(value, (tuple, list)) else (value,)
            dim = _BY_TOKEN[key]
            cut = tuple(_cut_part(each, kept.tokens, rows, dim, number) for each in parts)
            found[key] = type(value)(cut) if isinstance(value, (tuple, list)) else cut[0]
        elif isinstance(value, Tensor) and kept.tokens in value.shape and key not in _OF_THE_LOSS:
            raise ValueError(
                f"attention was given {key}, {list(value.shape)}, which seems to be by token, and "
                "nobody knows how to cut it: leave tokens.mode at exact with this model"
            )
    return found


def _cut_part(value: Any, tokens: int, rows: Tensor, dim: int, number: int | None) -> Any:
    if value is None:
        return None
    if value.dim() <= dim or value.shape[dim] != tokens:
        raise ValueError(
            f"attention was given positions of shape {list(value.shape)}, and not one for each of "
            f"{tokens} tokens"
        )
    if dim and number is not None and value.shape[0] > 1:
        value = value[number : number + 1]
    return value.index_select(dim, rows)


def _cut_mask(mask: Any, tokens: int, rows: Tensor, number: int | None) -> Any:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != tokens:
        raise ValueError(
            "attention was given a mask that is not [batch, heads, sequence, sequence]: load the "
            "model with attn_implementation='sdpa', or leave tokens.mode at exact"
        )
    if number is not None and mask.shape[0] > 1:
        mask = mask[number : number + 1]
    if mask.shape[-2] > 1:  # else all queries have the same
        mask = mask.index_select(-2, rows)
    return mask.index_select(-1, rows)
