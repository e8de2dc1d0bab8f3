"""The emulated device copies late, in order, and finds what is used too early or freed too soon."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from offload.device import EmulatedLink
from offload.native import Arena, Buffer, tensor_over

NBYTES = 1 << 16


class Gate:
    """A moment that comes when the test says so."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.open = self._open.set

    def query(self) -> bool:
        return self._open.is_set()

    def synchronize(self) -> None:
        self._open.wait()


@pytest.fixture
def link() -> Iterator[EmulatedLink]:
    made = EmulatedLink()
    yield made
    made.close()


def room() -> Buffer:
    buffer = Arena(4 * NBYTES).allocate(NBYTES, 8)
    assert buffer is not None
    return buffer


def data(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (NBYTES,), dtype=torch.uint8, generator=generator)


def test_bytes_go_out_and_come_back(link: EmulatedLink) -> None:
    source, buffer = data(), room()
    copied = link.copy_out(source, buffer, link.queue())
    target = link.empty(NBYTES, 24)
    assert target.data_ptr() % 64 == 24
    link.hold(link.copy_in(buffer, target, (copied,)), link.queue())
    assert torch.equal(target, source)
    (out_bytes, out_s), (in_bytes, in_s) = link.transferred()
    assert out_bytes == in_bytes == NBYTES
    assert out_s > 0
    assert in_s > 0


def test_what_has_not_arrived_is_poison(link: EmulatedLink) -> None:
    source, buffer, gate = data(), room(), Gate()
    tensor_over(buffer, torch.uint8).copy_(source)
    target = link.empty(NBYTES, 0)
    arrived = link.copy_in(buffer, target, (gate,))
    assert not arrived.query()
    assert bool((target == 0xA5).all())
    gate.open()
    arrived.synchronize()
    assert torch.equal(target, source)


def test_memory_freed_before_it_was_copied_is_an_error(link: EmulatedLink) -> None:
    slow = EmulatedLink(latency_s=0.05)
    copied = slow.copy_out(data().clone(), room(), 0)
    arrived = slow.copy_in(room(), slow.empty(NBYTES, 0), (copied,))
    for moment in (copied, arrived):  # what follows from it fails as well, and does not hang
        with pytest.raises(RuntimeError, match="freed before"):
            moment.synchronize()
    slow.close()


def test_copies_of_a_direction_keep_their_order(link: EmulatedLink) -> None:
    buffer = room()
    sources = [data(seed) for seed in range(20)]
    moments = [link.copy_out(source, buffer, link.queue()) for source in sources]
    moments[-1].synchronize()
    assert all(moment.query() for moment in moments)
    assert torch.equal(tensor_over(buffer, torch.uint8), sources[-1])


def test_pinned_memory_is_known_until_it_is_given_up(link: EmulatedLink) -> None:
    assert link.pin(4096, 100)
    assert link.pinned == {4096: 100}
    link.unpin(4096)
    assert link.pinned == {}
