"""Who may use an open offload: the process that opened it, and no forked child of it."""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol

__all__ = ["Owned", "foreign_process", "lock_out_children"]


class Owned(Protocol):
    """Something that one process has opened, and its lock."""

    process: int
    lock: Any


class _ForeignLock:
    """In a forked child, where a thread that is not there may hold the real lock for ever."""

    def __init__(self, process: int) -> None:
        self._process = process

    def __enter__(self) -> None:
        raise foreign_process(self._process)

    def __exit__(self, *_: object) -> None:
        """Nothing was taken."""

    # What the child lets go of, it may give back: nobody else is here.

    def acquire(self, blocking: bool = True) -> bool:
        return True

    def release(self) -> None:
        """Nothing was taken."""

    def _is_owned(self) -> bool:
        return False


def foreign_process(process: int) -> RuntimeError:
    """Return the error of a forked child that uses what `process` opened."""
    return RuntimeError(
        f"this ActivationOffload belongs to process {process}; a forked child has to make its own"
    )


_open: weakref.WeakSet[Owned] = weakref.WeakSet()


def lock_out_children(owned: Owned) -> None:
    """See to it that in a forked child `owned.lock` raises RuntimeError when entered.

    Asking for the process in every hook instead would cost a system call a saved tensor. A child
    that was not made by Python (C code that calls fork() and goes on in Python) is not seen here;
    native code refuses it.
    """
    _open.add(owned)


def _replace_locks() -> None:
    for owned in list(_open):
        owned.lock = _ForeignLock(owned.process)


os.register_at_fork(after_in_child=_replace_locks)
