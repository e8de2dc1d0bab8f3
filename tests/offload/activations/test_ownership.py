"""Tests of `offload.activations.ownership`: the opener works on, its forked children are told."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest

from offload.activations.ownership import foreign_process, lock_out_children


class Opened:
    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.RLock()
        lock_out_children(self)


def in_child(body) -> str:
    """Run `body` in a forked child; return what it says."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = body()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_a_thread_that_holds_the_lock_is_told_and_does_not_wait():
    opened = Opened()

    def enter() -> str:
        assert not opened.lock.acquire(False)
        assert not opened.lock._is_owned()
        with opened.lock:
            return "entered"

    holding, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with opened.lock:
            holding.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    try:
        said = in_child(enter)
    finally:
        leave.set()
        thread.join()
    assert said == f"RuntimeError: {foreign_process(opened.process)}"
    with opened.lock:
        assert opened.lock._is_owned()


def test_nothing_is_kept_alive_for_the_sake_of_children():
    opened = Opened()
    gone = weakref.ref(opened)
    del opened
    gc.collect()
    assert gone() is None
