"""What a `CudaLink` asks of CUDA, and in which order, told by streams and events that take notes.

Whether CUDA then does it is for a machine with a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from offload.device import cuda
from offload.device.cuda import CudaLink
from offload.native import Arena, Buffer, tensor_over

NBYTES = 4096
CPU = torch.device("cpu")


class Stream:
    """Notes what it is told to wait for."""

    def __init__(self, log: list[tuple[Any, ...]], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "waits for stream", other.name))

    def wait_event(self, event: Event) -> None:
        self.log.append((self.name, "waits for event", event.name))

    def synchronize(self) -> None:
        self.log.append((self.name, "is waited for"))


class Event:
    """Notes where it is recorded; has passed when `done` says so."""

    def __init__(self, machine: Machine, blocking: bool) -> None:
        self.machine, self.blocking, self.name = machine, blocking, f"event {len(machine.events)}"
        self.done = False
        machine.events.append(self)

    def record(self, stream: Stream | None = None) -> None:
        self.machine.log.append(((stream or self.machine.current).name, "records", self.name))

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.machine.log.append((self.name, "is waited for"))

    def elapsed_time(self, end: Event) -> float:
        return 1000.0  # milliseconds


class Machine:
    """A GPU that only takes notes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.events: list[Event] = []
        self.current = Stream(self.log, "compute")
        self.register_code = 0
        names = iter(("out", "in"))
        patch.setattr(cuda, "_Stream", lambda _device: Stream(self.log, next(names)))
        patch.setattr(
            cuda,
            "_Event",
            lambda enable_timing, blocking=False: Event(self, blocking),
        )
        patch.setattr(cuda, "_cudart", lambda: self)
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "current_stream", lambda _device=None: self.current)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.log.append(("register", address, nbytes, flags))
        return self.register_code


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def room() -> Buffer:
    buffer = Arena(2 * NBYTES).allocate(NBYTES, 0)
    assert buffer is not None
    return buffer


def test_a_copy_out_follows_who_made_it_and_who_computes_now(machine: Machine) -> None:
    link = CudaLink(CPU)
    made_on = Stream(machine.log, "another")
    source, buffer = torch.arange(NBYTES).to(torch.uint8), room()
    moment = link.copy_out(source, buffer, made_on)
    waits, begin, end = machine.log[:-2], machine.log[-2], machine.log[-1]
    assert set(waits) == {
        ("out", "waits for stream", "another"),
        ("out", "waits for stream", "compute"),
    }
    assert begin == ("out", "records", "event 0")
    assert end == ("out", "records", "event 1")
    assert moment is machine.events[1]
    assert machine.events[1].blocking, "who waits for it sleeps"
    assert torch.equal(tensor_over(buffer, torch.uint8), source)


def test_a_copy_in_follows_all_that_it_must(machine: Machine) -> None:
    link = CudaLink(CPU)
    free_at, departed = link.mark(), link.mark()
    buffer, target = room(), torch.zeros(NBYTES, dtype=torch.uint8)
    tensor_over(buffer, torch.uint8).fill_(7)
    machine.log.clear()
    moment = link.copy_in(buffer, target, (free_at, departed))
    assert machine.log == [
        ("in", "waits for event", "event 0"),
        ("in", "waits for event", "event 1"),
        ("in", "records", "event 2"),
        ("in", "records", "event 3"),
    ]
    machine.log.clear()
    link.hold(moment, link.queue())
    assert machine.log == [("compute", "waits for event", "event 3")]
    assert bool((target == 7).all())


def test_a_mark_is_of_the_queue_that_is_named(machine: Machine) -> None:
    link = CudaLink(CPU)
    link.mark()
    link.mark(Stream(machine.log, "side"))
    assert machine.log == [("compute", "records", "event 0"), ("side", "records", "event 1")]
    assert all(event.blocking for event in machine.events)


def test_only_copies_that_have_ended_are_counted(machine: Machine) -> None:
    link, source = CudaLink(CPU), torch.zeros(NBYTES, dtype=torch.uint8)
    for _ in range(3):
        link.copy_out(source, room(), link.queue())
    for event in machine.events[:4]:
        event.done = True
    assert link.transferred() == ((2 * NBYTES, 2.0), (0, 0))
    assert link.transferred() == ((2 * NBYTES, 2.0), (0, 0))


def test_events_do_not_pile_up_where_nobody_asks_for_times(machine: Machine) -> None:
    link, source, buffer = CudaLink(CPU), torch.zeros(NBYTES, dtype=torch.uint8), room()
    for _ in range(3 * cuda._MOST_UNTIMED):
        link.copy_out(source, buffer, link.queue())
        for event in machine.events[-2:]:
            event.done = True
    assert len(link._untimed[0]) <= cuda._MOST_UNTIMED


def test_memory_that_cannot_be_pinned_is_said_with_the_error(machine: Machine) -> None:
    link = CudaLink(CPU)
    assert link.pin(4096, 100)
    assert machine.log[-1] == ("register", 4096, 100, 1)
    machine.register_code = 712
    assert not link.pin(4096, 100)
    assert "712" in link.pinned_reason


def test_a_graph_being_captured_is_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = CudaLink(CPU)
    link.require_ready()
    monkeypatch.setattr(cuda, "_is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        link.require_ready()


def test_closing_waits_for_both_side_streams_and_for_no_device(machine: Machine) -> None:
    CudaLink(CPU).close()
    assert machine.log == [("out", "is waited for"), ("in", "is waited for")]
