"""Tests of `offload.activations.ownership`: the opener works on, its forked children are told."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from typing import Any

import pytest

from offload.activations.ownership import foreign_process, lock_out_children


class Opened:
    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.RLock()
        lock_out_children(self)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_a_thread_that_holds_the_lock_is_told_and_does_not_wait(in_child: Any) -> None:
    opened = Opened()

    def enter() -> str:
        assert not opened.lock._is_owned()
        try:
            with opened.lock:
                return "entered"
        except RuntimeError as error:
            return str(error)

    holding, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with opened.lock:
            holding.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    try:
        said = in_child(enter), in_child(lambda: in_child(enter))
    finally:
        leave.set()
        thread.join()
    assert set(said) == {str(foreign_process(opened.process))}, "a grandchild too"
    with opened.lock:
        assert opened.lock._is_owned()


def test_nothing_is_kept_alive_for_the_sake_of_children() -> None:
    opened = Opened()
    gone = weakref.ref(opened)
    del opened
    gc.collect()
    assert gone() is None
