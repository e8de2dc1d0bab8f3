"""Timing what a device does, some times each, in rounds that are far apart."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from offload.device.present import wait_for
from perfmodel.machine import Curve

__all__ = ["Stopwatch", "curve_of"]

_TENTHS = 10


class Stopwatch:
    """Takes the seconds of pieces of work on `device`.

    Everything is measured a few times in each of several rounds, so that what slows the machine
    for a moment is not all that is seen of one piece.
    """

    def __init__(self, device: torch.device, *, least: int = 3, enough_s: float = 0.02) -> None:
        self.device = device
        self._least, self._enough_s = least, enough_s

    def seconds(self, *works: Callable[[], object]) -> list[float]:
        """Return how long `works` took, one after the other, until `enough_s` have passed.

        At least each of them and `least` in all. The same work on other tensors has them come from
        memory, as they do in a step, and not from a cache; what each returns lives on meanwhile.
        """
        # Kernels are chosen and memory is found in the first.
        made = deque((work() for work in works), maxlen=len(works))
        found: list[float] = []
        least = max(self._least, len(works))
        while len(found) < least or (sum(found) < self._enough_s and len(found) < 100 * least):
            seconds, result = self._once(works[len(found) % len(works)])
            found.append(seconds)
            made.append(result)
        return found

    def _once(self, work: Callable[[], object]) -> tuple[float, object]:
        wait_for(self.device)
        begin_s = time.perf_counter()
        result = work()
        wait_for(self.device)
        return time.perf_counter() - begin_s, result


def curve_of(measured: Sequence[tuple[float, float, Sequence[float]]]) -> Curve:
    """Return the curve of pieces of work: the size of each, how much it is, and its seconds."""
    ordered = sorted(measured)
    sizes = tuple(size for size, _, _ in ordered)
    rates = tuple(amount / statistics.median(seconds) for _, amount, seconds in ordered)
    spreads = [_spread(seconds) for _, _, seconds in ordered]
    return Curve(sizes, rates, round(statistics.median(spreads), 4))


def _spread(seconds: Sequence[float]) -> float:
    if len(seconds) < 3:
        return 0.0
    cuts = statistics.quantiles(seconds, n=_TENTHS, method="inclusive")
    return min(10.0, (cuts[-1] - cuts[0]) / 2 / statistics.median(seconds))
