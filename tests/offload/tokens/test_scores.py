"""Scores of blocks are those of the definition, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload.tokens.scores import block_scores, pair_scores, pooled


def by_definition(
    query: Tensor, key: Tensor, scale: float, block: int, causal: bool, documents: Tensor
) -> Tensor:
    """Return the scores from the whole matrix of pairs."""
    groups = query.shape[1] // key.shape[1]
    whole = torch.einsum("bhid,bhjd->bhij", query, key.repeat_interleave(groups, 1)) * scale
    mean = whole.clamp(min=0).mean(1)
    length = query.shape[2]
    i, j = torch.arange(length)[:, None], torch.arange(length)
    counts = (i < j) if causal else (i > j)
    counts = counts | ((i // block == j // block) & (i != j)) if causal else counts
    same = documents[:, :, None] == documents[:, None, :]
    counts = counts & same
    blocks = math.ceil(length / block)
    found = torch.zeros(query.shape[0], blocks)
    for b in range(query.shape[0]):
        for n in range(blocks):
            tiles = []
            for m in range(blocks):
                tile = (slice(m * block, (m + 1) * block), slice(n * block, (n + 1) * block))
                if counts[b][tile].any():
                    tiles.append(float(mean[b][tile][counts[b][tile]].max()))
            found[b, n] = sum(tiles) / len(tiles) if tiles else 0.0
    return found


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_scores_are_those_of_the_whole_matrix(data: st.DataObject) -> None:
    groups, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 40))
    block = data.draw(st.sampled_from([1, 4, 8]))
    causal = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query = torch.randn(batch, heads * groups, length, 8, generator=generator)
    key = torch.randn(batch, heads, length, 8, generator=generator)
    documents = torch.randint(0, 2, (batch, length), generator=generator).cumsum(1) // 5
    may_look = (documents[:, :, None] == documents[:, None, :]).tril()
    whole = bool(data.draw(st.booleans()))
    found = block_scores(
        query,
        key,
        scale=0.3,
        block_tokens=block,
        causal=causal,
        may_look=None if whole else may_look,
    )
    seen = torch.zeros_like(documents) if whole else documents
    torch.testing.assert_close(found, by_definition(query, key, 0.3, block, causal, seen))


def test_a_causal_score_does_not_depend_on_later_tokens() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 4, 64, 8)
    other_query, other_key = query.clone(), key.clone()
    other_query[:, :, 32:], other_key[:, :, 32:] = torch.randn(2, 1, 4, 32, 8)
    one, two = (
        block_scores(*each, scale=1.0, block_tokens=8, causal=True)
        for each in ((query, key), (other_query, other_key))
    )
    assert torch.equal(one[:, :4], two[:, :4])
    assert not torch.equal(one[:, 4:], two[:, 4:])


def test_negative_scores_hide_no_positive_ones() -> None:
    query = torch.tensor([[[[1.0]], [[1.0]]]])
    key = torch.tensor([[[[5.0]], [[-5.0]]]])
    assert pair_scores(query, key, 1.0).item() == 2.5


@pytest.mark.parametrize("length", [8, 11])
def test_means_are_of_each_blocks_own_tokens(length: int) -> None:
    x = torch.arange(float(length))[None, :, None]
    found = pooled(x, 4).flatten().tolist()
    assert found == [float(x[0, at : at + 4].mean()) for at in range(0, length, 4)]
