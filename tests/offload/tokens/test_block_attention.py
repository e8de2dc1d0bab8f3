"""Attention over blocks is PyTorch's under a mask, and its own over masked tiles bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload.native import AttentionBlocks
from offload.tokens.block_attention import BlockAttention, masked_attention, positions_of
from offload.tokens.scores import block_scores

# Of an output, whose terms are added tile by tile and not row by row: each of up to 160 sums of
# products of about 1 is off by a few roundings of 2^-24.
NEARLY = 3e-5


def some(
    batch: int, heads: int, groups: int, length: int, channels: int, seed: int = 0
) -> list[Tensor]:
    """Return query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [heads * groups, heads, heads]
    return [
        torch.randn(batch, each, length, channels, generator=generator).requires_grad_()
        for each in shapes
    ]


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """Return an attention with its blocks; the last and shorter one in all of a batch, or none."""
    block = draw(st.sampled_from([4, 8, 32]))
    length = draw(st.integers(1, 5 * block))
    batch = draw(st.integers(1, 2))
    count = -(-length // block)
    has_last = draw(st.booleans()) or count == 1

    def listed() -> Tensor:
        most = count - 1 + has_last
        size = draw(st.integers(1, most))
        found = []
        for _ in range(batch):
            inner = draw(st.permutations(range(count - 1)))[: size - has_last]
            found.append(sorted([*inner, count - 1] if has_last else inner or [0]))
        shortest = min(map(len, found))
        return torch.tensor([each[len(each) - shortest :] for each in found])

    documents = torch.tensor(
        [[n // draw(st.integers(1, length)) for n in range(length)] for _ in range(batch)]
    ).cummax(1)[0]
    return {
        "given": some(
            batch,
            draw(st.integers(1, 2)),
            draw(st.integers(1, 3)),
            length,
            draw(st.sampled_from([3, 8, 16])),
            draw(st.integers(0, 99)),
        ),
        "rows": listed(),
        "columns": listed(),
        "block": block,
        "documents": documents if draw(st.booleans()) else None,
        "window": draw(st.sampled_from([0, 1, block, 2 * block + 1])),
    }


@given(cases())
@settings(max_examples=80, deadline=None)
def test_outputs_and_gradients_are_those_of_the_masked_dense_reference(
    case: dict[str, Any],
) -> None:
    attention = BlockAttention(case["block"], threads=2)
    more = {"documents": case["documents"], "window": case["window"], "scale": 0.4}
    found = attention(*case["given"], case["rows"], case["columns"], **more)
    documents = case["documents"]
    blocks = AttentionBlocks(
        rows=case["rows"].int(),
        columns=case["columns"].int(),
        block_tokens=case["block"],
        scale=0.4,
        documents=None if documents is None else documents.int(),
        window=case["window"],
    )
    expected = masked_attention(*case["given"], blocks)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=NEARLY, rtol=NEARLY)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        torch.autograd.grad((each * weight).sum(), case["given"]) for each in (found, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=10 * NEARLY, rtol=10 * NEARLY)


@pytest.mark.parametrize("length", [64, 100, 257])
def test_every_block_kept_is_pytorchs_attention(length: int) -> None:
    query, key, value = some(2, 2, 3, length, 32)
    rows = torch.arange(-(-length // 16)).expand(2, -1)
    found = BlockAttention(16)(query, key, value, rows)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, expected, atol=NEARLY, rtol=NEARLY)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_blocks_left_out_are_masked_tiles_to_the_bit(case: dict[str, Any]) -> None:
    query, key, value = case["given"]
    length, block, rows = query.shape[2], case["block"], case["rows"]
    attention = BlockAttention(block)
    blocks = AttentionBlocks(rows=rows.int(), columns=rows.int(), block_tokens=block, scale=1.0)
    at = positions_of(rows, blocks, length)
    found = attention(query, key, value, rows, window=case["window"])
    # All tiles, in which what was left out is of no document that anybody else is of.
    alone = torch.arange(length).expand(len(rows), -1).clone() + 1
    alone.scatter_(1, at, 0)
    every = torch.arange(-(-length // block)).expand(len(rows), -1)
    whole = attention(query, key, value, every, documents=alone, window=case["window"])
    index = at[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    expected = whole.gather(2, index)
    assert torch.equal(found, expected)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        torch.autograd.grad((each * weight).sum(), case["given"]) for each in (found, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_bits_do_not_depend_on_threads_or_where_tensors_lie() -> None:
    given_ = some(1, 2, 2, 96, 16)
    rows = torch.tensor([[0, 2, 5]])
    results = []
    for threads in (1, 3):
        for lies in (False, True):
            inputs = [
                each.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
                if lies
                else each
                for each in given_
            ]
            out = BlockAttention(16, threads=threads)(*inputs, rows)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_scores_of_blocks_are_the_plain_versions(causal: bool, documents: bool) -> None:
    query, key, _ = (each.detach() for each in some(2, 2, 2, 90, 16))
    own = (torch.arange(90) // 40).expand(2, -1) if documents else None
    pairs = BlockAttention(16).pair_scores(query, key, ahead=causal, scale=0.3, documents=own)
    counts = pairs >= 0
    found = (pairs * counts).sum(1) / counts.sum(1).clamp(min=1)
    may_look = None if own is None else (own[:, :, None] == own[:, None, :]).tril()
    expected = block_scores(
        query, key, scale=0.3, block_tokens=16, causal=causal, may_look=may_look
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (torch.tensor([[0, 9]]), "ascending numbers of blocks from 0 to 3"),
        (torch.tensor([[2, 1]]), "ascending numbers"),
        (torch.tensor([[-1]]), "ascending numbers"),
        (torch.zeros(1, 0, dtype=torch.long), "are empty"),
        (torch.tensor([0]), "no \\[batch, count\\]"),
        (torch.tensor([[0.5]]), "no \\[batch, count\\]"),
    ],
)
def test_wrong_blocks_are_refused(rows: Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        BlockAttention(16)(*some(1, 1, 1, 64, 8), rows)


def test_wrong_shapes_are_refused() -> None:
    query, key, value = some(1, 2, 1, 32, 8)
    rows = torch.tensor([[0]])
    with pytest.raises(ValueError, match="no query, key and value"):
        BlockAttention(16)(query, key, value[:, :1], rows)
    with pytest.raises(ValueError, match="the same tokens and channels"):
        BlockAttention(16)(query, key[:, :, :16], value[:, :, :16], rows)
    with pytest.raises(ValueError, match="in some of a batch"):
        BlockAttention(16)(*some(2, 1, 1, 40, 8), torch.tensor([[0], [2]]))


def test_what_a_kernel_must_not_see_is_refused() -> None:
    attention = BlockAttention(16)
    query, key, value = some(2, 2, 1, 64, 8)
    rows = torch.tensor([[0], [0]])
    for documents in (torch.zeros(1, 64), torch.zeros(2, 32), torch.zeros(2, 1)):
        with pytest.raises(ValueError, match="documents of shape"):
            attention(query, key, value, rows, documents=documents)
        with pytest.raises(ValueError, match="documents of shape"):
            attention.pair_scores(query, key, ahead=False, documents=documents)
    for other in (key[:, :, :16], key[:1], key[..., :4], key[:, :0]):
        with pytest.raises(ValueError, match=r"keys have to be|no query, key and value"):
            attention.pair_scores(query, other, ahead=False)
    for scale in (0.0, -0.3, float("nan")):
        with pytest.raises(ValueError, match="is not over 0"):
            attention(query, key, value, rows, scale=scale)


def test_other_types_go_pytorchs_way() -> None:
    given_ = [each.detach().bfloat16() for each in some(1, 2, 1, 64, 8)]
    rows = torch.tensor([[0, 3]])
    found = BlockAttention(16)(*given_, rows)
    expected = BlockAttention(16)(*(each.float() for each in given_), rows)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
