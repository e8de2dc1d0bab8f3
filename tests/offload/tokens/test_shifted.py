"""Attention within groups: a mask's, and nobody sees what comes later."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.tokens.shifted import Shifted, shifted_attention


@given(st.integers(1, 70), st.sampled_from([2, 8, 16]), st.integers(1, 2), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_groups_are_those_of_a_mask(length: int, size: int, kv_heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(2, heads, length, 4, generator=generator)
        for heads in (kv_heads * groups, kv_heads, kv_heads)
    )
    found = shifted_attention(query, key, value, size)
    at = torch.arange(length)
    half = query.shape[1] // 2
    masks = []
    for head in range(query.shape[1]):
        group = at // size if head < half else (at + size // 2) // size
        masks.append((group[:, None] == group) & (at <= at[:, None]))
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=torch.stack(masks))
    torch.testing.assert_close(found, expected)


def test_an_odd_group_and_a_mask_are_refused() -> None:
    x = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="even number"):
        shifted_attention(x, x, x, 3)
    with Shifted(4), pytest.raises(ValueError, match="leave group_tokens out"):
        F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(8, 8, dtype=torch.bool))
    with Shifted(4):
        found = F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3)
    assert torch.equal(found, shifted_attention(x, x, x, 4, scale=0.3))
