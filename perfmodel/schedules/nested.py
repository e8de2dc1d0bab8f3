"""Room for tensors whose lifetimes lie inside each other."""

from __future__ import annotations

import math
from collections import deque

__all__ = ["Nested"]


class Nested:
    """Room of tensors that are offered longest lifetime first, each inside the one before."""

    def __init__(self, limit: float, *, alone: bool = False) -> None:
        self._limit = limit
        self._alone = alone  # one that nothing else is there with may be larger
        self._out: deque[tuple[float, int]] = deque()  # until when, bytes
        self._out_bytes = 0
        self._in: deque[tuple[float, int]] = deque()  # since when, bytes of those before
        self._in_bytes = 0

    def fits(self, nbytes: int, away: tuple[float, float], back: tuple[float, float]) -> bool:
        """Say whether there is room for a tensor that takes it during `away` and `back`."""
        if self._limit == math.inf:
            return True
        while self._out and self._out[0][0] < away[0]:
            self._out_bytes -= self._out.popleft()[1]
        # A read that is outer begins later: it meets all that are inner and not yet released.
        while self._in and self._in[0][0] > back[1]:
            self._in.popleft()
        before = self._in[0][1] if self._in else self._in_bytes
        taken = max(self._out_bytes, self._in_bytes - before)
        return taken + nbytes <= self._limit or (self._alone and not taken)

    def add(self, nbytes: int, away: tuple[float, float], back: tuple[float, float]) -> None:
        """Take one that fits."""
        if self._limit < math.inf:
            self._out.append((away[1], nbytes))
            self._out_bytes += nbytes
            self._in.append((back[0], self._in_bytes))
            self._in_bytes += nbytes
