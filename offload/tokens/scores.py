"""How much the tokens of each block matter to the others, by attention's own queries and keys.

LeMo (USENIX ATC '25), section 4.2: of a pair of tokens the positive part of its score before the
softmax, as the mean over heads (Eq. 2; negative ones vanish there and would hide positive ones); of
a pair of blocks the largest, so that one token that matters saves its block. A block's own score is
the mean over those that look at it, and not the sum, which the first ones would win by being seen
by most.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_scores", "pair_scores", "pooled"]


def pooled(x: Tensor, tokens: int) -> Tensor:
    """Return means of each `tokens` rows of `x` [batch, sequence, channels], at the end of less."""
    batch, length, channels = x.shape
    whole = length // tokens * tokens
    means = x[:, :whole].reshape(batch, -1, tokens, channels).mean(2)
    if whole == length:
        return means
    return torch.cat([means, x[:, whole:].mean(1, keepdim=True)], dim=1)


def pair_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return [batch, rows, columns]: the mean over heads of positive parts of q·k times `scale`.

    `query` and `key` are [batch, heads, rows, channels]; fewer heads of keys are shared by groups.
    """
    groups = query.shape[1] // key.shape[1]
    total: Tensor | None = None
    for head in range(query.shape[1]):
        own = torch.matmul(query[:, head], key[:, head // groups].transpose(-1, -2))
        own = own.float().mul_(scale).clamp_(min=0)
        total = own if total is None else total.add_(own)
    assert total is not None
    return total / query.shape[1]


def block_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    block_tokens: int,
    causal: bool,
    may_look: Tensor | None = None,
) -> Tensor:
    """Return each block's score, [batch, blocks], in fp32; never holds all pairs of tokens.

    `query` and `key`, [batch, heads, sequence, channels], are as attention takes them. Queries look
    at keys at and before them; `causal` asks only those up to a block's end about it, as if they
    could: what later tokens are changes nothing. `may_look` [batch, sequence, sequence] or None:
    which pairs count otherwise, within documents say. A pair of a token with itself does not.
    """
    length = query.shape[2]
    blocks = -(-length // block_tokens)
    sums = torch.zeros(query.shape[0], blocks, device=query.device)
    looks = torch.zeros_like(sums)
    at = torch.arange(length, device=query.device)
    for m in range(blocks):
        rows = at[m * block_tokens : (m + 1) * block_tokens]
        first, last = int(rows[0]), int(rows[-1]) + 1
        columns = at[first:] if causal else at[:last]
        begin = int(columns[0])
        scores = pair_scores(
            query[:, :, first:last], key[:, :, begin : begin + len(columns)], scale
        )
        allowed = (rows[:, None] != columns) if causal else (columns < rows[:, None])
        allowed = allowed.expand(scores.shape)
        if may_look is not None:
            seen = may_look[:, first:last, begin : begin + len(columns)]
            # Asked about what is behind it, a query is as one that sees as much before it.
            if causal:
                seen = seen | may_look[:, begin : begin + len(columns), first:last].mT
            allowed = allowed & seen
        scores = scores.masked_fill(~allowed, -1.0)
        pad = -len(columns) % block_tokens
        scores = torch.nn.functional.pad(scores.amax(1), (0, pad), value=-1.0)
        most = scores.view(scores.shape[0], -1, block_tokens).amax(-1)
        n = begin // block_tokens
        there = most >= 0
        sums[:, n : n + most.shape[1]] += most.clamp(min=0)
        looks[:, n : n + most.shape[1]] += there
    return sums / looks.clamp(min=1)
