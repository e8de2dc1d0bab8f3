"""The order of forwards and backwards on one rank of a pipeline, as Megatron's schedules have it.

1F1B (Narayanan et al., PipeDream-Flush) and its interleaved form (arXiv 2104.04473, section 2.2);
the order of the latter is megatron-core 0.16.1's, pipeline_parallel/schedules.py:
`get_schedule_table` and `get_pp_rank_microbatches`.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Pass", "most_in_flight", "passes_of"]


class Pass(NamedTuple):
    """One micro-batch through one of a rank's model chunks, in one direction."""

    is_forward: bool
    chunk: int
    micro_batch: int


def passes_of(
    *, stages: int, rank: int, micro_batches: int, chunks: int = 1, group: int | None = None
) -> list[Pass]:
    """Return what rank `rank` of `stages` does in a step, in its order.

    `chunks`: of the model on each rank, 1 without interleaving; `group`: micro-batches that go
    through a chunk before the next one's turn, `stages` of them by default. Raises ValueError for
    numbers that no pipeline has.
    """
    if not 0 <= rank < stages or min(micro_batches, chunks) < 1:
        raise ValueError(
            f"rank={rank} of stages={stages} with micro_batches={micro_batches} and "
            f"chunks={chunks} is no pipeline"
        )
    forwards = _forwards(micro_batches, chunks, group or stages)
    backwards = [Pass(False, chunks - 1 - each.chunk, each.micro_batch) for each in forwards]
    warm_up = stages - rank - 1
    if chunks > 1:
        warm_up = 2 * warm_up + (chunks - 1) * (group or stages)
    warm_up = min(warm_up, len(forwards))
    found = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        found += [forward, backward]
    return found + backwards[len(forwards) - warm_up :]


def _forwards(micro_batches: int, chunks: int, group: int) -> list[Pass]:
    return [
        Pass(True, chunk, micro_batch)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for micro_batch in range(first, min(first + group, micro_batches))
    ]


def most_in_flight(passes: list[Pass]) -> int:
    """Return how many forwards wait for their backward at the worst moment."""
    most = now = 0
    for each in passes:
        now += 1 if each.is_forward else -1
        most = max(most, now)
    return most
