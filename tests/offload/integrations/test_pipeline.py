"""The order that is expected of a rank is the one that megatron-core's own schedules have."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.core")

from megatron.core.pipeline_parallel.schedules import (
    get_pp_rank_microbatches,
    get_schedule_table,
)

from perfmodel.schedules.pipeline import Pass, passes_of

SIZES = [
    (stages, chunks, micro_batches)
    for stages, chunks, micro_batches in itertools.product((2, 4, 8), (1, 2), range(4, 33, 4))
    if chunks == 1 or micro_batches % stages == 0
]


def megatrons(stages: int, rank: int, chunks: int, micro_batches: int) -> list[Pass]:
    """Return what megatron-core's functions have a rank do."""
    group = SimpleNamespace(size=lambda: stages, rank=lambda: rank)
    between = SimpleNamespace(
        pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
    )
    _, _, warm_up, *_ = get_pp_rank_microbatches(
        micro_batches, chunks, stages, p2p_communicator=between
    )
    table = get_schedule_table(micro_batches, chunks, stages)
    forwards = [Pass(True, chunk, number) for number, chunk in table]
    backwards = [Pass(False, chunks - 1 - chunk, number) for number, chunk in table]
    found = forwards[:warm_up]
    for at in range(warm_up, len(table)):
        found += [forwards[at], backwards[at - warm_up]]
    return found + backwards[len(table) - warm_up :]


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), SIZES)
def test_the_order_is_megatrons(stages: int, chunks: int, micro_batches: int) -> None:
    for rank in range(stages):
        ours = passes_of(stages=stages, rank=rank, micro_batches=micro_batches, chunks=chunks)
        assert ours == megatrons(stages, rank, chunks, micro_batches)
