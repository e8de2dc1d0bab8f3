"""Copies of gradients in host memory, under way while the backward goes on.

Memory is bounded: each parameter has one place, pinned, and what is added to it comes through two
buffers of a subgroup each. One thread waits for the copies and adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from offload.device import Moment
from offload.device.updates import UpdateDevice
from offload.native import ThreadPool, squared_norm
from offload.optimizer.sharded import local_part

__all__ = ["EarlyCopies", "EarlyCopy"]

_ALIGNMENT = 64
_NUM_BUFFERS = 2


@dataclass(frozen=True)
class EarlyCopy:
    """A gradient's elements on the host, all there."""

    elements: torch.Tensor
    grad: torch.Tensor
    version: int
    square: float
    """The sum of squares of `elements`; nan where it was not asked for."""

    def is_of(self, grad: torch.Tensor | None, square: float | None) -> bool:
        """Say whether `grad`, whose squares add up to `square`, is still what was copied.

        A change through `.data` leaves no other trace than the sum of squares.
        """
        return grad is self.grad and grad._version == self.version and square == self.square


@dataclass
class _Sent:
    grad: torch.Tensor
    version: int
    work: list[Future[float]]


class EarlyCopies:
    """Owns the memory on the host, until it is closed.

    `releases`: what is sent again is added to what is there, instead of taking its place, and may
    be of another type.
    """

    def __init__(self, device: UpdateDevice, buffer_params: int, *, releases: bool) -> None:
        self._device, self._buffer_params, self._releases = device, buffer_params, releases
        self._pool = ThreadPool(1)
        self._places: dict[torch.Tensor, torch.Tensor] = {}
        self._sent: dict[torch.Tensor, _Sent] = {}
        self._lent: set[torch.Tensor] = set()
        self._buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
        self._pinned: list[torch.Tensor] = []
        self._worker: ThreadPoolExecutor | None = None

    def make_room(self, params: Mapping[torch.Tensor, torch.dtype]) -> None:
        """Have a place for each of these from now on, of that type, and for no others.

        Nothing may be on its way; what was handed out stays as it is.
        """
        assert not self._sent
        self._give_back()
        begins, end = {}, 0
        for param, dtype in params.items():
            begins[param] = end
            end += -(-_count(param) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        memory = self._pin(torch.empty(end, dtype=torch.uint8))
        self._places = {
            param: memory[begins[param] :][: _count(param) * dtype.itemsize].view(dtype)
            for param, dtype in params.items()
        }
        if self._releases and params:
            for _ in range(_NUM_BUFFERS):
                self._buffers.put(self._pin(torch.empty(self._buffer_params)))

    def _pin(self, memory: torch.Tensor) -> torch.Tensor:
        if memory.nbytes:
            self._device.pin(memory.data_ptr(), memory.nbytes)
            self._pinned.append(memory)
        return memory

    def place_of(self, param: torch.Tensor) -> torch.Tensor | None:
        """Return where its elements are to be; None where it has no place."""
        return self._places.get(param)

    def has_sent(self, param: torch.Tensor) -> bool:
        """Say whether something of it is there, or on its way."""
        return param in self._sent

    def send(self, param: torch.Tensor, flat: torch.Tensor, grad: torch.Tensor) -> None:
        """Copy the elements `flat` of `grad`, once the computation so far has been done.

        Both are kept until that has been. Raises RuntimeError where the place is still in use.
        """
        if param in self._lent and self._releases:
            raise RuntimeError(
                "a step has failed midway and still needs the gradients that it was given: call "
                "step() again to finish it, before another backward"
            )
        place, before = self._places[param], self._sent.get(param)
        adds = self._releases and before is not None
        if self._releases and (adds or flat.dtype != place.dtype):
            work = self._send_through_buffers(flat, place, adds=adds)
        else:
            came = self._device.copy("gradients", flat, place, (self._device.ready(),))
            work = [self._submit(came, flat, place)]
        work = [*before.work, *work] if before is not None else work
        self._sent[param] = _Sent(grad, grad._version, work)

    def _send_through_buffers(
        self, flat: torch.Tensor, place: torch.Tensor, *, adds: bool
    ) -> list[Future[float]]:
        ready, work = self._device.ready(), []
        size = self._buffer_params
        for begin in range(0, flat.numel(), size):
            part, target = flat[begin : begin + size], place[begin : begin + size]
            buffer = self._buffers.get()  # waits for the worker, which waits for copies
            came = self._device.copy(
                "gradients", part, buffer.view(flat.dtype)[: part.numel()], (ready,)
            )
            work.append(self._submit_adding(came, part, buffer, target, adds=adds))
        return work

    def _submit(self, came: Moment, flat: torch.Tensor, place: torch.Tensor) -> Future[float]:
        def settle(_source: torch.Tensor) -> float:
            came.synchronize()
            # Nobody can change what is released.
            return math.nan if self._releases else squared_norm(self._pool, place)

        return self._thread().submit(settle, flat)

    def _submit_adding(
        self,
        came: Moment,
        part: torch.Tensor,
        buffer: torch.Tensor,
        target: torch.Tensor,
        *,
        adds: bool,
    ) -> Future[float]:
        def settle() -> float:
            try:
                came.synchronize()
                arrived = buffer.view(part.dtype)[: part.numel()]
                if adds:
                    target.add_(arrived)
                else:
                    target.copy_(arrived)
            finally:
                self._buffers.put(buffer)
            return math.nan

        return self._thread().submit(settle)

    def _thread(self) -> ThreadPoolExecutor:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="offload gradients")
        return self._worker

    def arrived(self) -> dict[torch.Tensor, EarlyCopy]:
        """Wait for all that was sent, and hand it out: until `take_back`, where it is released.

        Raises what a copy has failed with.
        """
        sent, self._sent = self._sent, {}
        copies = {}
        for param, one in sent.items():
            square = [work.result() for work in one.work][-1]
            copies[param] = EarlyCopy(self._places[param], one.grad, one.version, square)
        self._lent = set(copies)
        return copies

    def take_back(self) -> None:
        """Have the places free for other gradients."""
        self._lent.clear()

    def drop(self) -> None:
        """Forget what was sent."""
        sent, self._sent = self._sent, {}
        for one in sent.values():
            for work in one.work:
                work.exception()  # waits

    def close(self) -> None:
        """Wait for what is on its way, and give the memory back. Idempotent."""
        self.drop()
        self._give_back()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def _give_back(self) -> None:
        self._places, self._buffers = {}, SimpleQueue()
        while self._pinned:
            self._device.unpin(self._pinned.pop().data_ptr())


def _count(param: torch.Tensor) -> int:
    return local_part(param).numel()
