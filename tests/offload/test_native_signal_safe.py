"""Tests of `TryLock` and `HeldKeys` in `offload.native`: nothing waits, and each key goes once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from offload.native import HeldKeys, TryLock


def elsewhere(ask: Callable[[], Any]) -> Any:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(ask()))
    thread.start()
    thread.join()
    return answers[0]


def is_free(lock: Any) -> bool:
    """Ask from another thread, to which a lock that this one holds is not free."""

    def ask() -> bool:
        if lock.acquire(blocking=False):
            lock.release()
            return True
        return False

    return bool(elsewhere(ask))


def test_a_free_lock_is_taken_and_given_back() -> None:
    lock = threading.RLock()
    with TryLock(lock) as taken:
        assert taken
        assert not is_free(lock)
    assert is_free(lock)


def test_a_lock_of_this_thread_is_not_taken_twice_nor_given_back() -> None:
    lock = threading.RLock()
    with lock:
        with TryLock(lock) as taken:
            assert not taken
        assert not is_free(lock)
    assert is_free(lock)


def test_a_lock_of_another_thread_is_not_waited_for_nor_given_back() -> None:
    lock = threading.RLock()

    def attempt() -> bool:
        with TryLock(lock) as taken:
            return taken

    with lock:
        assert elsewhere(attempt) is False
        assert not is_free(lock)
    assert is_free(lock)


def test_an_exception_in_the_body_gives_the_lock_back_and_goes_on() -> None:
    lock = threading.RLock()
    with pytest.raises(KeyError), TryLock(lock):
        raise KeyError("on purpose")
    assert is_free(lock)


def test_what_is_no_lock_is_an_error() -> None:
    with pytest.raises(AttributeError), TryLock(object()):
        pass


def test_each_key_is_freed_once_at_the_end_of_life() -> None:
    freed: list[int] = []
    keys = HeldKeys(freed.append)
    for key in range(5):
        keys.append(key)
    assert (len(keys), freed) == (5, [])
    del keys
    assert sorted(freed) == [0, 1, 2, 3, 4]


def test_what_was_freed_is_not_freed_again() -> None:
    freed: list[int] = []
    keys = HeldKeys(freed.append)
    keys.append(1)
    keys.free()
    assert (len(keys), freed) == (0, [1])
    keys.append(2)
    keys.free()
    keys.free()
    del keys
    assert freed == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_key_that_cannot_be_freed_does_not_keep_the_others() -> None:
    freed: list[int] = []

    def free(key: int) -> None:
        freed.append(key)
        if key == 1:
            raise KeyError(key)

    keys = HeldKeys(free)
    for key in range(3):
        keys.append(key)
    keys.free()
    assert sorted(freed) == [0, 1, 2]
    del keys
    assert len(freed) == 3


def test_an_exception_under_way_survives_the_end_of_the_keys() -> None:
    freed: list[int] = []

    def hold() -> None:
        keys = HeldKeys(freed.append)
        keys.append(7)
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose") as caught:
        hold()
    caught.value.__traceback__ = None
    del caught
    assert freed == [7]
