"""Tests of `perfmodel.schedules.pipeline`: every pass once, in an order that can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.schedules.pipeline import Pass, most_in_flight, passes_of


def test_1f1b_is_as_it_was_published() -> None:
    last = passes_of(stages=3, rank=2, micro_batches=3)
    assert last == [Pass(way, 0, number) for number in range(3) for way in (True, False)]
    first = passes_of(stages=3, rank=0, micro_batches=4)
    assert [("F" if each.is_forward else "B") + str(each.micro_batch) for each in first] == [
        *("F0", "F1", "F2", "B0", "F3", "B1", "B2", "B3")
    ]


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 8), st.data())
def test_every_forward_has_its_backward_after_it(
    stages: int, chunks: int, groups: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, stages - 1))
    micro_batches = groups * stages
    passes = passes_of(stages=stages, rank=rank, micro_batches=micro_batches, chunks=chunks)
    assert len(passes) == len(set(passes)) == 2 * micro_batches * chunks
    begun: set[tuple[int, int]] = set()
    for each in passes:
        key = each.chunk, each.micro_batch
        assert (key in begun) is not each.is_forward
        begun.add(key)


@given(st.integers(2, 8), st.integers(8, 32))
def test_earlier_stages_of_1f1b_hold_a_micro_batch_more_each(
    stages: int, micro_batches: int
) -> None:
    held = [
        most_in_flight(passes_of(stages=stages, rank=rank, micro_batches=micro_batches))
        for rank in range(stages)
    ]
    assert held == [*range(stages, 0, -1)]


@pytest.mark.parametrize("wrong", [{"rank": 2}, {"rank": -1}, {"micro_batches": 0}, {"chunks": 0}])
def test_what_no_pipeline_has_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is no pipeline"):
        passes_of(**{"stages": 2, "rank": 0, "micro_batches": 2, **wrong})
