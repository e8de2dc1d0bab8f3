"""Tests of `perfmodel.pipeline_step`: what a pipeline's step takes, with activations moved."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.cluster import bubble_share, simulate_cluster
from perfmodel.known_models import read_known_model
from perfmodel.machine import Machine, read_machine
from perfmodel.pipeline_step import ChunkCosts, chunk_costs, pipeline_step
from perfmodel.schedules.pipeline import most_in_flight, passes_of
from perfmodel.workload import Parallel, Workload

ONE = ChunkCosts(forward_s=1.0, backward_s=2.0, saved_bytes=1.0)
MOVED = replace(ONE, moved_bytes=1.0, write_s=0.5, read_s=0.5)
SIZES = [
    (stages, chunks, micro_batches)
    for stages in (2, 4, 8)
    for chunks in (1, 2)
    for micro_batches in (4, 8, 16, 32)
    if chunks == 1 or micro_batches % stages == 0
]


def even(stages: int, chunks: int, costs: ChunkCosts) -> list[list[ChunkCosts]]:
    """Return chunks that are all alike."""
    return [[costs] * chunks] * stages


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), SIZES)
def test_the_bubble_of_even_stages_is_the_published_one(
    stages: int, chunks: int, micro_batches: int
) -> None:
    step = pipeline_step(even(stages, chunks, ONE), micro_batches)
    expected = bubble_share(stages, micro_batches, chunks)
    assert step.bubble_share == pytest.approx(expected, rel=1e-9)
    for rank, held in enumerate(step.device_bytes):
        passes = passes_of(stages=stages, rank=rank, micro_batches=micro_batches, chunks=chunks)
        assert held == most_in_flight(passes)


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), SIZES)
def test_a_fast_enough_drive_costs_no_time_and_holds_the_memory(
    stages: int, chunks: int, micro_batches: int
) -> None:
    kept = pipeline_step(even(stages, chunks, ONE), micro_batches)
    moved = pipeline_step(even(stages, chunks, MOVED), micro_batches)
    # One backward of a rank has to wait at most, the first, which nothing was read for before.
    assert moved.duration_s <= kept.duration_s * (1 + stages * chunks * 0.5 / kept.duration_s)
    # In work in both directions, read ahead, and pieces on their way out.
    assert max(moved.device_bytes) <= 4
    assert max(moved.written_bytes) <= micro_batches * chunks


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SIZES),
    st.floats(0.01, 10),
    st.floats(0.01, 10),
    st.floats(0.01, 10),
    st.floats(0.01, 10),
    st.integers(1, 4),
)
def test_a_slow_drive_costs_time_and_never_memory(
    size: tuple[int, int, int],
    forward_s: float,
    backward_s: float,
    write_s: float,
    read_s: float,
    leaving: int,
) -> None:
    stages, chunks, micro_batches = size
    costs = replace(
        MOVED, forward_s=forward_s, backward_s=backward_s, write_s=write_s, read_s=read_s
    )
    step = pipeline_step(even(stages, chunks, costs), micro_batches, leaving=leaving)
    assert max(step.device_bytes) <= 3 + leaving / 4
    busy_s = micro_batches * chunks * (forward_s + backward_s)
    assert step.duration_s >= busy_s
    kept = pipeline_step(even(stages, chunks, replace(costs, moved_bytes=0.0)), micro_batches)
    assert step.duration_s == pytest.approx(kept.duration_s + step.waited_s)


def test_what_a_slow_drive_makes_wait_is_said() -> None:
    slow = replace(MOVED, write_s=20.0, read_s=20.0, pieces=1)
    step = pipeline_step(even(2, 1, slow), 4)
    # The first rank writes all four, and its last backward waits for the last of them.
    assert step.waited_s > 60
    assert step.duration_s > 80


def workload(**parallel: int) -> tuple[Workload, Machine]:
    """Return a step of a large model on the machines of SSDTrain's paper."""
    return (
        Workload(
            model=read_known_model("llama-2-7b"),
            seq_len=2048,
            micro_batch=1,
            accumulation=8,
            dtype="bfloat16",
            parallel=Parallel(**parallel),
            framework="megatron",
        ),
        read_machine("a100-80gb-sxm"),
    )


def test_without_messages_the_sums_of_a_cluster_are_no_shorter_than_its_events() -> None:
    given_workload, machine = workload(pipeline=4)
    summed = simulate_cluster(given_workload, machine)
    step = pipeline_step(chunk_costs(given_workload, machine), 8)
    # By sums each stage takes as long as the one that has the head.
    assert 0.8 * summed.step_s < step.duration_s < summed.step_s


def test_a_machine_without_a_drive_is_refused() -> None:
    given_workload, machine = workload(pipeline=2)
    with pytest.raises(ValueError, match="has no drive"):
        chunk_costs(given_workload, replace(machine, drive=None), moves=True)
