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

_SLACK = 0.1
"""How far the share of a sequence's beginning may be off, of the whole."""


@dataclass(eq=False, frozen=True)
class Kept:
    """The tokens of one sequence, or a batch of them, that take part in one layer's attention."""

    rows: Tensor
    """[batch, kept], ascending, int64: where they stand in the sequence."""
    tokens: int
    """In a whole sequence."""
    blocks: tuple[tuple[int, ...], ...]
    """Of each of the batch, ascending; as many in each."""

    @property
    def count(self) -> int:
        """How many tokens of each sequence are kept."""
        return int(self.rows.shape[1])

    @property
    def share(self) -> float:
        """How much of a sequence is kept."""
        return self.count / self.tokens


def choose_by_share(scores: Sequence[float], share: float, *, causal: bool) -> list[bool]:
    """Say of each block whether it is among the best, `share` of all.

    `causal`: from the scores up to its own alone. Then of every beginning of a sequence the share
    is kept, but for a tenth of all that is, and in between the better ones.
    """
    count = len(scores)
    if not causal:
        best = sorted(range(count), key=lambda n: (-scores[n], n))[: math.ceil(share * count)]
        chosen = set(best)
        return [n in chosen for n in range(count)]
    slack = max(1.0, _SLACK * share * count)
    seen: list[float] = []
    kept: list[bool] = []
    ahead = 0.0  # by how many more were kept than are due
    for score in scores:
        bisect.insort(seen, score)
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

    All arguments are [batch, blocks]; the last block may be shorter, and is kept. Where one of a
    batch keeps fewer blocks than another it keeps its next best beside them, padding at last.
    """
    picked = []
    for each, must, out in zip(chosen, always, never, strict=True):
        last = len(each) - 1
        wanted = zip(each, must, out, strict=True)
        picked.append({n for n, (c, m, o) in enumerate(wanted) if m or (c and not o)} | {last})
    most = max(map(len, picked))
    for found, order, out in zip(picked, scores, never, strict=True):
        rest = sorted(set(range(len(order))) - found, key=lambda n: (out[n], -order[n], n))
        found.update(rest[: most - len(found)])
    blocks = tuple(tuple(sorted(found)) for found in picked)
    inside = torch.arange(block_tokens)
    rows = (torch.tensor(blocks)[:, :, None] * block_tokens + inside).flatten(1)
    over = math.ceil(tokens / block_tokens) * block_tokens - tokens
    rows = rows[:, : rows.shape[1] - over]
    return Kept(rows.to(device), tokens, blocks)
