"""Copies of gradients in host memory, under way while the backward goes on.

Each parameter has one place, pinned. What is added to it comes through two buffers of a subgroup
each, and one thread waits for it and adds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from offload.device import Moment
from offload.device.updates import UpdateDevice
from offload.optimizer.sharded import local_part

__all__ = ["EarlyCopies", "EarlyCopy", "place_bytes"]

_ALIGNMENT = 64
_NUM_BUFFERS = 2


@dataclass(frozen=True)
class EarlyCopy:
    """A gradient's elements on the host, all there."""

    elements: torch.Tensor
    grad: torch.Tensor
    versions: tuple[int, int]

    def is_of(self, grad: torch.Tensor | None) -> bool:
        """Say whether nobody has changed `grad` since, as far as PyTorch's counters tell."""
        return grad is self.grad and _versions_of(grad) == self.versions


def _versions_of(grad: torch.Tensor) -> tuple[int, int]:
    return grad._version, local_part(grad)._version  # of a DTensor these are two


@dataclass
class _Sent:
    grad: torch.Tensor
    versions: tuple[int, int]
    came: Moment
    added: list[Future[None]]

    def wait(self) -> None:
        self.came.synchronize()
        for work in self.added:
            work.result()


class EarlyCopies:
    """Owns the memory on the host, until it is closed.

    `adds`: what is sent again is added to what is there, instead of taking its place, and may be of
    another type.
    """

    def __init__(self, device: UpdateDevice, buffer_params: int, *, adds: bool) -> None:
        self._device, self._buffer_params, self._adds = device, buffer_params, adds
        self._places: dict[torch.Tensor, torch.Tensor] = {}
        self._sent: dict[torch.Tensor, _Sent] = {}
        # Elements that must live until they have been copied.
        self._leaving: deque[tuple[Moment, torch.Tensor]] = deque()
        self._buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
        self._memory: list[torch.Tensor] = []
        self._pinned: list[torch.Tensor] = []
        self._worker: ThreadPoolExecutor | None = None

    def make_room(self, params: Mapping[torch.Tensor, torch.dtype]) -> None:
        """Have a place for each of these from now on, of that type, and for no others.

        Nothing may be on its way; what was handed out stays as it is.
        """
        self.drop()
        self._give_back()
        begins, end = {}, 0
        for param, dtype in params.items():
            begins[param] = end
            end += place_bytes(param, dtype)
        memory = self._allocate(end)
        self._places = {
            param: memory[begins[param] :][: _nbytes(param, dtype)].view(dtype)
            for param, dtype in params.items()
        }
        if self._adds and params:
            for _ in range(_NUM_BUFFERS):
                self._buffers.put(self._allocate(4 * self._buffer_params))

    def _allocate(self, nbytes: int) -> torch.Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        self._memory.append(memory)
        if nbytes and self._device.pin(memory.data_ptr(), nbytes):
            self._pinned.append(memory)
        return memory

    @property
    def buffer_bytes(self) -> int:
        """What there is beside the places, for what is added to them."""
        return 4 * self._buffer_params * _NUM_BUFFERS if self._adds else 0

    def memory_bytes(self) -> int:
        """Return what the places and buffers take in host memory."""
        return sum(memory.nbytes for memory in self._memory)

    def place_of(self, param: torch.Tensor) -> torch.Tensor | None:
        """Return where its elements are to be; None where it has no place."""
        return self._places.get(param)

    def has_sent(self, param: torch.Tensor) -> bool:
        """Say whether something of it is there, or on its way."""
        return param in self._sent

    def send(self, param: torch.Tensor, flat: torch.Tensor, grad: torch.Tensor) -> None:
        """Copy the elements `flat` of `grad`, once the computation so far has been done."""
        place, before = self._places[param], self._sent.get(param)
        ready = self._device.ready()
        added: list[Future[None]] = []
        if self._adds and (before is not None or flat.dtype != place.dtype):
            added = self._send_through_buffers(flat, place, ready, first=before is None)
            came = before.came if before is not None else ready
        else:
            came = self._device.copy("gradients", flat, place, (ready,))
            self._leaving.append((came, flat))
        if before is not None:
            added = [*(work for work in before.added if not _went_well(work)), *added]
        self._sent[param] = _Sent(grad, _versions_of(grad), came, added)
        while self._leaving and self._leaving[0][0].query():
            self._leaving.popleft()

    def _send_through_buffers(
        self, flat: torch.Tensor, place: torch.Tensor, ready: Moment, *, first: bool
    ) -> list[Future[None]]:
        work = []
        for begin in range(0, flat.numel(), self._buffer_params):
            part = flat[begin : begin + self._buffer_params]
            buffer = self._buffers.get()  # waits for the worker, which waits for copies
            arrived = buffer[: part.nbytes].view(flat.dtype)
            try:
                came = self._device.copy("gradients", part, arrived, (ready,))
            except BaseException:
                self._buffers.put(buffer)  # or the next ones would wait for it for ever
                raise
            target = place[begin : begin + self._buffer_params]
            work.append(
                self._thread().submit(self._settle, came, part, arrived, buffer, target, first)
            )
        return work

    def _settle(
        self,
        came: Moment,
        _source: torch.Tensor,  # lives until here
        arrived: torch.Tensor,
        buffer: torch.Tensor,
        target: torch.Tensor,
        first: bool,
    ) -> None:
        try:
            came.synchronize()
            if first:
                target.copy_(arrived)
            else:
                target.add_(arrived)
        finally:
            self._buffers.put(buffer)

    def _thread(self) -> ThreadPoolExecutor:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="offload gradients")
        return self._worker

    def arrived(self) -> dict[torch.Tensor, EarlyCopy]:
        """Wait for all that was sent and return it; it stays sent. Raises what a copy failed with.

        The elements are in their place: valid until something is sent there again.
        """
        for one in self._sent.values():
            one.wait()
        self._leaving.clear()
        return {
            param: EarlyCopy(self._places[param], one.grad, one.versions)
            for param, one in self._sent.items()
        }

    def drop(self) -> None:
        """Forget what was sent, once nothing of it is on its way."""
        for one in self._sent.values():
            for work in one.added:
                work.exception()  # waits
        for moment, _ in self._leaving:
            moment.synchronize()
        self._leaving.clear()
        self._sent.clear()

    def close(self) -> None:
        """Wait for what is on its way, and give the memory back. Idempotent."""
        try:
            self.drop()
        finally:
            self._give_back()
            if self._worker is not None:
                self._worker.shutdown()
                self._worker = None

    def _give_back(self) -> None:
        self._places, self._buffers = {}, SimpleQueue()
        while self._pinned:
            self._device.unpin(self._pinned.pop().data_ptr())
        self._memory.clear()


def place_bytes(param: torch.Tensor, dtype: torch.dtype) -> int:
    """Return what the place of a gradient of this type takes."""
    return -(-_nbytes(param, dtype) // _ALIGNMENT) * _ALIGNMENT


def _nbytes(param: torch.Tensor, dtype: torch.dtype) -> int:
    return local_part(param).numel() * dtype.itemsize


def _went_well(work: Future[None]) -> bool:
    return work.done() and work.exception() is None
