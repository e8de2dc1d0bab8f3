"""The order that is expected of a rank is the one that megatron-core's own schedules have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.pipeline_parallel.schedules import (
    get_pp_rank_microbatches,
    get_schedule_table,
)

from offload.integrations.pipeline import Pipeline
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


class Told:
    """Stands for what moves activations: notes which forward it is told of, and when."""

    closed = False

    def __init__(self) -> None:
        self.told: list[Any] = []

    def forward(self) -> Any:
        return Forward()

    def hint(self, *, next_backward: Any) -> None:
        self.told.append(next_backward)


class Forward:
    """One forward of `Told`."""

    ended = False

    def __enter__(self) -> Forward:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True


def run(pipeline: Pipeline, passes: list[Pass]) -> Iterator[tuple[Pass, Any]]:
    """Do as a schedule does; give each backward with its forward, before it begins."""
    outputs: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}
    for each in passes:
        key = each.chunk, each.micro_batch
        if each.is_forward:
            with pipeline.forward(each.chunk) as own:
                assert own == key
                output = torch.ones(1, requires_grad=True) * 2
                outputs[key] = pipeline._open[own], output
            pipeline.follow(own, output)
        else:
            forward, output = outputs.pop(key)
            yield each, forward
            output.backward()


@contextmanager
def expected(stages: int, rank: int, chunks: int, count: int) -> Iterator[tuple[Pipeline, Told]]:
    """Give a pipeline that knows its step."""
    told: Any = Told()
    pipeline = Pipeline(SimpleNamespace(activations=told), chunks)  # type: ignore[arg-type]
    assert pipeline.begins
    pipeline.expect(stages=stages, rank=rank, micro_batches=count, group=stages)
    yield pipeline, told
    assert pipeline.begins


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), SIZES)
def test_each_backward_is_told_of_before_it_begins(
    stages: int, chunks: int, micro_batches: int
) -> None:
    for rank in range(stages):
        passes = megatrons(stages, rank, chunks, micro_batches)
        with expected(stages, rank, chunks, micro_batches) as (pipeline, told):
            for number, (_, forward) in enumerate(run(pipeline, passes)):
                # In the order of backwards, and this one by now, with at most one ahead.
                assert forward in told.told
                seen = list(dict.fromkeys(map(id, told.told)))
                assert number < len(seen) <= number + 2
                assert seen[number] == id(forward)


def test_a_forward_without_a_backward_ends_with_its_output() -> None:
    told: Any = Told()
    pipeline = Pipeline(SimpleNamespace(activations=told), 1)  # type: ignore[arg-type]
    for _ in range(3):
        assert pipeline.begins
        pipeline.expect(stages=2, rank=0, micro_batches=None, group=None)
        with pipeline.forward(0) as key:
            output = torch.ones(1, requires_grad=True) * 2
        pipeline.follow(key, output)
        assert not pipeline.begins
        del output
