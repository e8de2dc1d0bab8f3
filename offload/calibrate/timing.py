"""Timing what a device does, some times each, in rounds that are far apart."""

from __future__ import annotations

import statistics
import time
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

    def seconds(self, work: Callable[[], object]) -> list[float]:
        """Return how long `work` took, at least `least` times or until `enough_s` have passed."""
        work()  # kernels are chosen and memory is found in the first
        found: list[float] = []
        while len(found) < self._least or (
            sum(found) < self._enough_s and len(found) < 100 * self._least
        ):
            found.append(self.once(work))
        return found

    def once(self, work: Callable[[], object]) -> float:
        """Return how long `work` takes once, until the device has done it."""
        wait_for(self.device)
        begin_s = time.perf_counter()
        work()
        wait_for(self.device)
        return time.perf_counter() - begin_s


def curve_of(measured: Sequence[tuple[float, Sequence[float]]]) -> Curve:
    """Return the curve of pieces of work: the size of each, and the seconds that it took."""
    ordered = sorted(measured)
    sizes = tuple(size for size, _ in ordered)
    rates = tuple(size / statistics.median(seconds) for size, seconds in ordered)
    spreads = [_spread(seconds) for _, seconds in ordered]
    return Curve(sizes, rates, round(statistics.median(spreads), 4))


def _spread(seconds: Sequence[float]) -> float:
    if len(seconds) < 3:
        return 0.0
    cuts = statistics.quantiles(seconds, n=_TENTHS, method="inclusive")
    return min(10.0, (cuts[-1] - cuts[0]) / 2 / statistics.median(seconds))
