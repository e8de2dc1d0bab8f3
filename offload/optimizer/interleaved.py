"""One update of states that lie on a device and on the host beside it, as a schedule says.

All that the device does is queued at once, ordered by moments; then the calling thread updates what
the host is to update, gradients coming ahead of it and parameters going back behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload.device import Moment
from offload.device.updates import Arrays, UpdateDevice
from offload.native import AdamSettings, ThreadPool
from offload.optimizer.interruption import Uninterrupted
from offload.optimizer.layout import Piece
from offload.optimizer.states import States, renew_master

__all__ = ["Interleaved", "Job", "Progress"]


@dataclass(frozen=True)
class Job:
    """A subgroup to be updated.

    Its `states` are on the device where `place` is `resident`, in host memory where it is `moved`.
    `steps` counts from 1, by parameter; `grad_of` gives a piece's gradient on the device, and
    `on_host_of` the one in host memory, where it is there already. Master copies of `stale` pieces
    are made anew before.
    """

    place: str
    states: States
    pieces: Sequence[Piece]
    settings: AdamSettings
    steps: Mapping[torch.Tensor, int]
    grad_of: Callable[[Piece], torch.Tensor]
    on_host_of: Callable[[Piece], torch.Tensor | None] = lambda _piece: None
    stale: Sequence[Piece] = ()


class Progress(Protocol):
    """How far a step has come, so that another one can go on from there after an error."""

    done: set[int]
    """Numbers of subgroups that are updated, on their way or there."""
    pieces: set[tuple[int, int]]
    """Numbers of a subgroup not done, and of its pieces that are."""


class Interleaved:
    """Owns the buffers on both sides.

    On the device for `buffers` subgroups that move, on the host for gradients and parameters of
    `slots` that do not.
    """

    def __init__(
        self, device: UpdateDevice, pool: ThreadPool, most_params: int, *, buffers: int, slots: int
    ) -> None:
        self._device, self._pool = device, pool
        rows = 3 * most_params
        buffer = [torch.empty(rows, device=device.device) for _ in range(buffers)]
        # Each with what must have come before it is written: at first, whatever the computation
        # still does with memory that was given back and is this buffer now.
        self._free: deque[tuple[torch.Tensor, tuple[Moment, ...]]] = deque(
            (each, (device.ready(),)) for each in buffer
        )
        self._left: dict[States, Moment] = {}  # when states were back in host memory
        # As wide as the widest type; the memory is pinned as one.
        self._slots = torch.empty(slots, 2, most_params)
        device.pin(self._slots.data_ptr(), self._slots.nbytes)
        self._written: deque[States] = deque()

    def memory_bytes(self) -> int:
        """Return what the buffers on both sides take."""
        return self._slots.nbytes + sum(buffer.nbytes for buffer, _ in self._free)

    def close(self) -> None:
        """Give the memory back, once nothing comes or goes."""
        try:
            self.settle()
        finally:
            self._device.unpin(self._slots.data_ptr())

    def settle(self) -> None:
        """Wait until states that have moved are back, so that the host may look at them."""
        for moment in self._left.values():
            moment.synchronize()
        self._left.clear()

    def run(
        self, jobs: Mapping[int, Job], clip: float, progress: Progress, signals: Uninterrupted
    ) -> None:
        """Update all of them, in their order, but for what `progress` says has been.

        The caller's computation goes on only once that has been done. Raises OSError where states
        on the SSD cannot be read or have no room; those on the device are updated all the same.
        """
        began = self._device.ready()
        pending: list[Moment] = []
        here = {number: job for number, job in jobs.items() if job.place == "host"}
        try:
            self._queue_device(jobs, clip, began, pending, progress)
            self._update_host(here, clip, began, pending, progress, signals)
        finally:
            for moment in pending:
                self._device.hold(moment)
            self._settle(0)

    def _queue_device(
        self,
        jobs: Mapping[int, Job],
        clip: float,
        began: Moment,
        pending: list[Moment],
        progress: Progress,
    ) -> None:
        for number, job in jobs.items():
            if job.place == "resident":
                pending += self._update(number, job, job.states.begin(), clip, (began,), progress)
            elif job.place == "moved":
                buffer, after = self._free[0]  # which it stays, should something here fail
                far = job.states.begin()
                near = buffer[: far.numel()].view(far.shape)
                if job.states in self._left:  # as they were after the last step
                    after = (*after, self._left[job.states])
                came = self._device.copy("states in", far, near, after)
                updated = self._update(number, job, near, clip, (began, came), progress)
                self._left[job.states] = left = self._device.copy("states out", near, far, updated)
                self._free.popleft()
                self._free.append((buffer, (left,)))
                pending.append(left)
            if job.place != "host":
                progress.done.add(number)

    def _update(
        self,
        number: int,
        job: Job,
        rows: torch.Tensor,
        clip: float,
        after: tuple[Moment, ...],
        progress: Progress,
    ) -> tuple[Moment, ...]:
        """Queue the update of a subgroup whose states are on the device when `after` has come."""
        for place, piece in enumerate(job.pieces):
            if job.place == "resident" and (number, place) in progress.pieces:
                continue  # of one that moves, nothing has come back from a step that failed
            arrays = _arrays(piece, rows, job.grad_of(piece), piece.of(piece.param.detach()))
            step = job.steps[piece.param]
            done = self._device.update(job.settings, step, arrays, clip=clip, after=after)
            progress.pieces.add((number, place))
            after = (done,)
        return after

    def _update_host(
        self,
        jobs: Mapping[int, Job],
        clip: float,
        began: Moment,
        pending: list[Moment],
        progress: Progress,
        signals: Uninterrupted,
    ) -> None:
        free: deque[tuple[torch.Tensor, list[Moment]]] = deque((slot, []) for slot in self._slots)
        coming: deque[tuple[int, torch.Tensor, list[Moment]]] = deque()
        waiting = deque(jobs)
        while waiting or coming:
            while waiting and free:
                slot, gone = free.popleft()
                number = waiting.popleft()
                came = self._fetch_grads(jobs[number], slot, [began, *gone])
                # Its other half may still be on its way, and from a step that failed midway as
                # well, where no gradient is to come after it.
                coming.append((number, slot, [began, *gone, *came]))
            signals.deliver()
            number, slot, came = coming.popleft()
            for near in [number, *(each for each, _, _ in coming)][:2]:
                jobs[near].states.prefetch()
            for moment in came:
                moment.synchronize()
            gone = self._update_here(number, jobs[number], slot, clip, pending, progress)
            progress.done.add(number)
            free.append((slot, gone))
            self._settle(1)

    def _settle(self, most: int) -> None:
        """Wait until no more than `most` of those written are on their way to the SSD."""
        while len(self._written) > most:
            self._written[0].evict()
            self._written.popleft()

    def _fetch_grads(self, job: Job, slot: torch.Tensor, after: list[Moment]) -> list[Moment]:
        moments = []
        for piece in job.pieces:
            if job.on_host_of(piece) is not None:
                continue
            grad = job.grad_of(piece)
            target = _within(slot[0], piece, grad.dtype)
            moments.append(self._device.copy("gradients", grad, target, after))
        return moments

    def _update_here(
        self,
        number: int,
        job: Job,
        slot: torch.Tensor,
        clip: float,
        pending: list[Moment],
        progress: Progress,
    ) -> list[Moment]:
        gone = []
        rows = job.states.begin()
        for place, piece in enumerate(job.pieces):
            on_device = piece.of(piece.param.detach())
            param = _within(slot[1], piece, on_device.dtype)
            if (number, place) in progress.pieces:  # updated, but maybe not sent
                param.copy_(piece.inside(rows[2]))
            else:
                if piece in job.stale:
                    renew_master(piece.inside(rows[2]), on_device)
                grad = job.on_host_of(piece)
                if grad is None:
                    grad = _within(slot[0], piece, job.grad_of(piece).dtype)
                arrays = _arrays(piece, rows, grad, param)
                step = job.steps[piece.param]
                self._device.update_on_host(self._pool, job.settings, step, arrays, clip=clip)
                progress.pieces.add((number, place))
            gone.append(self._device.copy("parameters", param, on_device, ()))
            pending.append(gone[-1])
        job.states.commit()
        self._written.append(job.states)
        return gone


def _within(half: torch.Tensor, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    """Return a piece's place in half a slot, as elements of `dtype`.

    It begins where those of the widest type would: pieces of several types are beside each other.
    """
    count = piece.end - piece.begin
    return half[piece.at : piece.at + count].view(dtype)[:count]


def _arrays(piece: Piece, rows: torch.Tensor, grad: torch.Tensor, param: torch.Tensor) -> Arrays:
    state = [piece.inside(row) for row in rows]
    if len(state) < 3:  # the parameter is its own master
        return Arrays(grad, param, state[0], state[1], None)
    return Arrays(grad, state[2], state[0], state[1], param)
