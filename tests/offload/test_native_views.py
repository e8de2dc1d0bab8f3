"""Tests of `SavedView` in `offload.native`: it says what it was told, and announces its end."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.native import DropBox, SavedView

DIMS = st.lists(
    st.tuples(st.integers(0, 2**62), st.integers(-(2**62), 2**62)), min_size=0, max_size=12
)


def box_of(calls: list[str]) -> DropBox:
    return DropBox(lambda: calls.append("settle"))


def view_of(
    box: DropBox, size: tuple[int, ...] = (2,), stride: tuple[int, ...] = (1,), region: Any = "r"
) -> SavedView:
    return SavedView(box, region, torch.int8, size, stride, 7, True, False)


@given(DIMS)
def test_a_view_says_what_it_was_told(dims: list[tuple[int, int]]) -> None:
    size, stride = tuple(n for n, _ in dims), tuple(n for _, n in dims)
    view = view_of(box_of([]), size, stride)
    assert (view.size, view.stride) == (size, stride)
    assert (view.region, view.dtype, view.offset) == ("r", torch.int8, 7)
    assert (view.conj, view.neg, view.read) == (True, False, False)


def test_the_end_of_a_view_is_in_the_box_and_settled_soon() -> None:
    calls: list[str] = []
    box = box_of(calls)
    views = [view_of(box, region=number) for number in range(3)]
    views[1].read = True
    assert not box
    del views
    assert box
    assert (sorted(box.unread), box.read) == ([0, 2], [1])
    for _ in range(1000):  # a pending call is due when the interpreter next looks
        if calls:
            break
    assert calls == ["settle"], "one call for all of them"


def test_each_end_is_told_though_a_call_was_interrupted() -> None:
    told: list[str] = []

    def fail() -> None:
        told.append("settle")
        raise KeyError("on purpose")

    box = DropBox(fail)
    for count in (1, 2):
        with pytest.raises(KeyError, match="on purpose"):
            [view_of(box) for _ in range(1000)].clear()
        assert len(told) == count


def test_an_exception_under_way_survives_the_end_of_a_view() -> None:
    box = box_of([])

    def fail() -> None:
        view = view_of(box)
        assert not view.read
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    gc.collect()
    assert box.unread == ["r"]


def test_a_box_does_not_keep_whom_it_tells() -> None:
    class Owner:
        def __init__(self) -> None:
            self.box = DropBox(self.settle)

        def settle(self) -> None:
            """Nothing to do."""

    owner = Owner()
    gone, box = weakref.ref(owner), owner.box
    view = view_of(box)
    del owner, box
    gc.collect()
    assert gone() is not None, "the view still has to tell"
    del view
    gc.collect()
    assert gone() is None


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
    box = box_of([])
    with pytest.raises(error):
        view_of(box, size, stride)
    assert not box


def test_the_garbage_collector_has_nothing_to_visit_in_a_view() -> None:
    assert not gc.is_tracked(view_of(box_of([])))
