"""Tests of `offload.activations.recording`: a device's clock leaves out what it waited for."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from offload.activations.recording import DeviceClock, HostClock, Recording
from offload.device import EmulatedLink


class Queue(EmulatedLink):
    """A device whose marks are numbers, handed out as they stand in `now`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0

    def mark(self, queue: Any = None) -> Any:
        return self.now

    def elapsed_s(self, begin: Any, end: Any) -> float:
        return float(end - begin)


def test_waits_do_not_count() -> None:
    queue = Queue()
    clock = DeviceClock(queue)
    marks = []
    for step in range(6):
        queue.now = 101.0 + step
        marks.append(clock.mark())
        if step in (1, 3):
            queue.now += 0.75
            clock.waited(marks[-1])
    assert clock.seconds(marks) == [1, 2, 2.25, 3.25, 3.5, 4.5]


def test_a_trace_is_the_same_by_either_clock() -> None:
    queue, host_s = Queue(), 0.0
    host = HostClock(lambda: 0.0)
    by_device, by_host = Recording(DeviceClock(queue)), Recording(host)
    for recording in (by_device, by_host):
        for number in range(3):
            host_s = 100.0 + number
            recording.saved.append(host_s)
            recording.storages.append(number)
            recording.needed[number] = 110.0 - number
            recording.released[number] = 110.5 - number
    assert by_device.trace((4, 5, 6)) == by_host.trace((4, 5, 6))


def test_a_duration_is_never_negative() -> None:
    recording = Recording(HostClock(lambda: 0.0))
    assert recording.duration_s(2.0, 5.0) == 3
    assert recording.duration_s(5.0, 2.0) == 0


def test_time_spent_waiting_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr("offload.activations.recording.perf_counter", lambda: next(ticks))
    waited = iter([0, 0, 5, 5, 5])
    recording = Recording(HostClock(lambda: next(waited)))
    assert [recording.mark() for _ in range(5)] == [0, 1, -3, -2, -1]


def test_a_clock_that_runs_backwards_still_gives_a_trace() -> None:
    recording = Recording(HostClock(lambda: 0.0))
    recording.saved, recording.storages = [5.0, 4.0, 6.0], [7, 8, 9]
    recording.needed = {0: 4.5, 1: 7.0}
    recording.released = {0: 4.0, 1: 6.5, 2: 9.0}
    tensors = recording.trace((1, 2, 3)).tensors
    assert [tensor.saved_s for tensor in tensors] == [0, 0, 1]
    assert [tensor.released_s for tensor in tensors] == [0, 1.5, 4]
    assert tensors[2].needed_s == 4, "nobody asked for it"


def test_regions_of_one_storage_are_known_as_such() -> None:
    recording = Recording(HostClock(lambda: 0.0))
    for storage in (70, 80, 70, 90, 80):
        recording.save(storage, 400)
    recording.needed = dict.fromkeys(range(5), 1e12)
    recording.released = dict.fromkeys(range(5), 1e12)
    assert [tensor.storage for tensor in recording.trace((1,) * 5).tensors] == [0, 1, 0, 3, 1]
