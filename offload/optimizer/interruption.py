"""Work that must be noted down before a signal's handler may raise: Ctrl-C between the two."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from types import FrameType
from typing import Any

__all__ = ["Uninterrupted"]


class Uninterrupted:
    """Holds back Python's signal handlers within a `with`; `deliver()` lets them run.

    What a handler raises comes out of `deliver()`, or of the `with` at its end. Only the main
    thread has handlers run in it: in any other one this does nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._pending: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> Uninterrupted:
        if threading.current_thread() is threading.main_thread():
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pending.append((number, frame))

    def deliver(self) -> None:
        """Run the handlers of the signals that have come: all, whatever one of them raises."""
        with ExitStack() as stack:
            while self._pending:
                number, frame = self._pending.pop()  # the last is called first: of those pushed
                stack.callback(self._handlers[number], number, frame)

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.deliver()
