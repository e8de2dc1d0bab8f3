"""Tests of `SavedView` in `offload.native`: it says what it was told, and announces its end."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.native import SavedView

DIMS = st.lists(
    st.tuples(st.integers(0, 2**62), st.integers(-(2**62), 2**62)), min_size=0, max_size=12
)


def view_of(
    inbox: list[tuple[Any, bool]],
    calls: list[str],
    size: tuple[int, ...] = (2,),
    stride: tuple[int, ...] = (1,),
) -> SavedView:
    return SavedView(
        inbox, lambda: calls.append("settle"), "r", torch.int8, size, stride, 7, True, False
    )


@given(DIMS)
def test_a_view_says_what_it_was_told(dims: list[tuple[int, int]]) -> None:
    size, stride = tuple(n for n, _ in dims), tuple(n for _, n in dims)
    view = view_of([], [], size, stride)
    assert (view.size, view.stride) == (size, stride)
    assert (view.region, view.dtype, view.offset) == ("r", torch.int8, 7)
    assert (view.conj, view.neg, view.read) == (True, False, False)


def test_the_end_of_a_view_is_in_the_inbox_and_settled_soon() -> None:
    inbox: list[tuple[Any, bool]] = []
    calls: list[str] = []
    views = [view_of(inbox, calls) for _ in range(3)]
    views[1].read = True
    for _ in range(3):
        views.pop()
    assert inbox == [("r", False), ("r", True), ("r", False)]
    for _ in range(1000):  # a pending call is due when the interpreter next looks
        if calls:
            break
    assert calls == ["settle"], "one call for all of them"


def test_an_exception_under_way_survives_the_end_of_a_view() -> None:
    inbox: list[tuple[Any, bool]] = []

    def fail() -> None:
        view = view_of(inbox, [])
        assert not view.read
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    gc.collect()
    assert inbox == [("r", False)]


@pytest.mark.parametrize(
    ("size", "stride", "error"),
    [
        ((1, 2), (1,), ValueError),
        ((1,), ("x",), TypeError),
        ((2**70,), (1,), OverflowError),
        ([1], (1,), TypeError),
    ],
)
def test_a_wrong_geometry_is_refused_and_announces_nothing(
    size: Any, stride: Any, error: type[Exception]
) -> None:
    inbox: list[tuple[Any, bool]] = []
    with pytest.raises(error):
        view_of(inbox, [], size, stride)
    assert inbox == []


def test_the_garbage_collector_has_nothing_to_visit_in_a_view() -> None:
    assert not gc.is_tracked(view_of([], []))
