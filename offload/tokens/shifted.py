"""Attention within groups of tokens, half of the heads shifted by half a group.

LongLoRA's S2-Attn (ICLR 2024), as LeMo puts it on kept tokens for its two-dimensional sparsity.
But for one thing: there the last shifted group goes on with the first tokens, which then see later
ones; here it ends where the sequence does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from offload.tokens.interception import AttentionCalls

__all__ = ["Shifted", "shifted_attention"]


def shifted_attention(
    query: Tensor, key: Tensor, value: Tensor, group_tokens: int, **more: Any
) -> Tensor:
    """Return causal attention [batch, heads, tokens, channels] within groups of `group_tokens`.

    The second half of the heads has groups that begin half a group later. `more` is for PyTorch's
    attention. Raises ValueError for an odd group.
    """
    if group_tokens < 2 or group_tokens % 2:
        raise ValueError(f"group_tokens={group_tokens} is not an even number from 2 up")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    qkv = (query, key, value)
    half, shift = query.shape[1] // 2, group_tokens // 2
    whole = _Part(*(each[:, :half] for each in qkv))
    first = _Part(*(each[:, half:, :shift] for each in qkv))
    rest = _Part(*(each[:, half:, shift:] for each in qkv))
    moved = [_grouped(part, group_tokens, more) for part in (first, rest) if part.query.shape[2]]
    parts = [_grouped(whole, group_tokens, more)] if half else []
    return torch.cat([*parts, torch.cat(moved, dim=2)], dim=1)


class _Part(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


def _grouped(part: _Part, size: int, more: dict[str, Any]) -> Tensor:
    batch, heads, length, _ = part.query.shape
    size = min(size, length)
    over = -length % size  # behind all that is there, where nobody looks
    count = (length + over) // size

    def in_groups(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, over)) if over else x
        parts = padded.reshape(batch, heads, count, size, x.shape[-1])
        return parts.transpose(1, 2).reshape(batch * count, heads, size, x.shape[-1])

    query, key, value = map(in_groups, part)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, **more)
    out = out.view(batch, count, heads, size, -1).transpose(1, 2)
    return out.reshape(batch, heads, count * size, -1)[:, :, :length]


class Shifted(AttentionCalls):
    """While entered, has calls of PyTorch's causal attention be `shifted_attention`.

    Raises ValueError for a call with a mask, whose tokens are not groups.
    """

    def __init__(self, group_tokens: int) -> None:
        super().__init__()
        self._group_tokens = group_tokens

    def attend(self, given: dict[str, Any]) -> Any:
        """Attend within groups."""
        if given.get("attn_mask") is not None or not given.get("is_causal"):
            raise ValueError(
                "group_tokens is for attention without a mask, and here is one of padding, "
                "documents or a window: leave group_tokens out"
            )
        more = {key: given[key] for key in ("dropout_p", "scale") if key in given}
        qkv = _Part(given["query"], given["key"], given["value"])
        return shifted_attention(*qkv, group_tokens=self._group_tokens, **more)
