"""Which blocks of tokens take part in a layer's attention, from their scores.

After LeMo (USENIX ATC '25), section 4.2: a block stays where its score is high enough; and beyond
it, where a rule says so, and without a look at what comes later.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Kept", "choose_by_share", "choose_by_threshold", "kept_of"]

_SLACK, _SLACK_BLOCKS = 0.1, 2
"""How far the share of a sequence's beginning may be off: of what is due, and blocks beside it."""


@dataclass(eq=False, frozen=True)
class Kept:
    """The tokens of each sequence of a batch that take part in one layer's attention."""

    rows: tuple[Tensor, ...]
    """Of each sequence: [kept], ascending, int64: where they stand in it."""
    tokens: int
    """In a whole sequence."""
    blocks: tuple[tuple[int, ...], ...]
    """Of each sequence, ascending."""

    @property
    def share(self) -> float:
        """How much of the sequences is kept."""
        return sum(map(len, self.rows)) / (self.tokens * len(self.rows))


def choose_by_share(scores: Sequence[float], share: float, *, causal: bool) -> list[bool]:
    """Say of each block whether it is among the best, `share` of all.

    `causal`: from the scores up to its own alone. Then of every beginning of a sequence the share
    is kept, but for a tenth and two blocks, and in between the better ones.
    """
    count = len(scores)
    if not causal:
        best = sorted(range(count), key=lambda n: (-scores[n], n))[: math.ceil(share * count)]
        chosen = set(best)
        return [n in chosen for n in range(count)]
    seen: list[float] = []
    kept: list[bool] = []
    ahead = 0.0  # by how many more were kept than are due
    for score in scores:
        bisect.insort(seen, score)
        slack = _SLACK_BLOCKS + _SLACK * share * len(seen)
        ahead -= share
        better = (len(seen) - bisect.bisect_right(seen, score)) / len(seen)
        # The more are ahead, the better has the next one to be.
        stays = better < share * (1 - ahead / slack) or ahead <= -slack
        kept.append(stays)
        ahead += stays
    return kept


def choose_by_threshold(scores: Sequence[float], threshold: float) -> list[bool]:
    """Say of each block whether its score is over the layer's threshold."""
    return [score > threshold for score in scores]


def kept_of(
    chosen: Sequence[Sequence[bool]],
    scores: Sequence[Sequence[float]],
    *,
    always: Sequence[Sequence[bool]],
    never: Sequence[Sequence[bool]],
    tokens: int,
    block_tokens: int,
    device: torch.device,
) -> Kept:
    """Return the tokens of the blocks that are chosen or always kept, and never of the others.

    All arguments are [batch, blocks], of which the last may be shorter. Each sequence is for
    itself: what another one keeps changes nothing. One that would keep none keeps its best.
    """
    blocks = []
    for each, own, must, out in zip(chosen, scores, always, never, strict=True):
        wanted = zip(each, must, out, strict=True)
        picked = [n for n, (c, m, o) in enumerate(wanted) if m or (c and not o)]
        there = [n for n in range(len(own)) if not out[n]] or range(len(own))
        blocks.append(tuple(picked or [max(there, key=own.__getitem__)]))
    inside = torch.arange(block_tokens)
    rows = []
    for each_blocks in blocks:
        at = (torch.tensor(each_blocks)[:, None] * block_tokens + inside).flatten()
        rows.append(at[at < tokens].to(device))
    return Kept(tuple(rows), tokens, tuple(blocks))
