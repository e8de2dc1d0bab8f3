"""When each region of a forward was saved, wanted and released, without the time of stalls."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any

from offload.device import DeviceLink
from perfmodel.schedules.trace import SavedTensor, Trace

__all__ = ["DeviceClock", "HostClock", "Recording"]


class HostClock:
    """Marks are seconds, as they would be had nobody waited."""

    def __init__(self, idle_s: Callable[[], float]) -> None:
        self._idle_s = idle_s

    def mark(self) -> Any:
        """Return the present."""
        return perf_counter() - self._idle_s()

    def waited(self, begin: Any) -> None:
        """Do nothing: who waits says so in `idle_s`."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Return when the marks were made."""
        return list(marks)


class DeviceClock:
    """Marks are points in a device's queue, which runs behind the host that fills it."""

    def __init__(self, link: DeviceLink) -> None:
        self._link = link
        self.first = link.mark()
        # Marks before and after each time the computation waited, in its order.
        self._stalls: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        """Return the computation as far as it is queued."""
        return self._link.mark()

    def waited(self, begin: Any) -> None:
        """Take in that the computation did nothing of its own since the mark `begin`."""
        self._stalls.append((begin, self._link.mark()))

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Return when the marks were passed, less the stalls before them; waits for the last."""
        elapsed_s = self._link.elapsed_s
        ends, waited_s = [0.0], [0.0]
        for begin, end in self._stalls:
            ends.append(elapsed_s(self.first, end))
            waited_s.append(waited_s[-1] + elapsed_s(begin, end))
        times = [elapsed_s(self.first, mark) for mark in marks]
        # Ends are in the queue's order but for the rounding of their clock.
        return [time_s - waited_s[bisect_right(ends, time_s) - 1] for time_s in times]


class Recording:
    """The marks of one forward and its backward."""

    def __init__(self, clock: HostClock | DeviceClock) -> None:
        self.clock = clock
        self.mark = clock.mark
        self.begun = clock.first if isinstance(clock, DeviceClock) else None
        self.saved: list[Any] = []
        self.storages: list[int] = []
        """Of each region, as its forward calls it."""
        self.storage_bytes: dict[int, int] = {}
        self.needed: dict[int, Any] = {}
        self.released: dict[int, Any] = {}
        self.held: set[int] = set()
        self.asked_again: set[int] = set()
        """Regions of which a view was wanted more than once."""

    def save(self, storage: int, storage_bytes: int) -> None:
        """Take in that a region of `storage`, which is so large, has been saved now."""
        self.saved.append(self.mark())
        self.storages.append(storage)
        self.storage_bytes[storage] = storage_bytes

    def duration_s(self, begin: Any, end: Any) -> float:
        """Return the seconds from one mark to another."""
        begin_s, end_s = self.clock.seconds((begin, end))
        return max(0.0, end_s - begin_s)

    def trace(self, sizes: Sequence[int], transients: Iterable[tuple[int, int]] = ()) -> Trace:
        """Return what was recorded of regions with these sizes.

        Behind them stand `transients`: bytes that cannot leave, from the first need of a region
        until the next one is needed. Waits until a device has come to the last mark.
        """
        saved_at = self.clock.seconds(self.saved)
        begin_s = saved_at[0]
        needed_at = self._times(self.needed)
        released_at = self._times(self.released)
        latest_s = max(released_at.values(), default=begin_s)
        tensors = []
        saved_s = 0.0
        first = {storage: number for number, storage in reversed([*enumerate(self.storages)])}
        rest = {storage: self.storage_bytes.get(storage, 0) for storage in self.storages}
        for number, nbytes in enumerate(sizes):
            rest[self.storages[number]] -= nbytes
            if number in self.held:  # what it is a part of stays whoever moves
                rest[self.storages[number]] = 0
        for number, nbytes in enumerate(sizes):
            # Stalls are known only as well as their clock: times must not run backwards.
            saved_s = max(saved_s, saved_at[number] - begin_s)
            released_s = max(saved_s, released_at.get(number, latest_s) - begin_s)
            needed_s = needed_at.get(number, released_s + begin_s) - begin_s
            needed_s = min(max(saved_s, needed_s), released_s)
            held = number in self.held
            storage = first[self.storages[number]]
            rest_bytes = max(0, rest[self.storages[number]]) if storage == number else 0
            tensors.append(
                SavedTensor(nbytes, saved_s, needed_s, released_s, held, storage, rest_bytes)
            )
        needs = sorted(tensor.needed_s for tensor in tensors)
        passing = []
        for number, nbytes in transients:
            needed_s = max(saved_s, tensors[number].needed_s)
            after = bisect_right(needs, needed_s)
            end_s = needs[after] if after < len(needs) else max(needed_s, latest_s - begin_s)
            passing.append(SavedTensor(nbytes, needed_s, end_s, end_s, held=True))
        passing.sort(key=lambda tensor: tensor.saved_s)
        return Trace((*tensors, *passing))

    def _times(self, marks: dict[int, Any]) -> dict[int, float]:
        return dict(zip(marks, self.clock.seconds(tuple(marks.values())), strict=True))
