"""A device that updates some of what lies on the host: all that takes goes there and comes back.

Parameters and gradients are in host memory already, as DeepSpeed's are with ZeRO-Offload, so that
the host updates its part where it is. The device's part costs the link 16 bytes a parameter of fp32
on the way in and 12 on the way out. Interleaving them is Deep Optimizer States' update (section 4
of its paper), and `perfmodel` says how much of it the device should take.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch

from offload.config import OptimizerConfig
from offload.device import Moment
from offload.device.updates import Arrays, UpdateDevice
from offload.native import ThreadPool
from offload.optimizer.calibration import measure_rates
from offload.optimizer.layout import Piece, Subgroup
from offload.optimizer.states import HostStates, States, renew_master
from offload.optimizer.update import Update
from perfmodel.schedules.updates import UpdateRates, UpdateSchedule, named_schedule, plan_updates

__all__ = ["LentDevice", "made_of"]

_log = logging.getLogger(__name__)
Laid = Sequence[tuple[Subgroup, States]]
_ROWS = 5  # a gradient, a parameter, and at most three states


class LentDevice:
    """Updates on `device`, which stays its owner's, the subgroups that a schedule gives it.

    States on the SSD are the host's alone. Copies are beside the computation where memory is
    pinned: states are here, parameters and gradients by whoever owns them.
    """

    def __init__(self, device: UpdateDevice, pool: ThreadPool, config: OptimizerConfig) -> None:
        self._device, self._pool = device, pool
        self._wanted = config.update_schedule
        self._moved: set[States] = set()
        self._planned_for = 0
        self._pinned: list[int] = []
        self._free: deque[tuple[torch.Tensor, tuple[Moment, ...]]] = deque()
        self._under_way: list[Moment] = []
        self.rates: UpdateRates | None = None
        """As they were measured; None where the schedule was not asked to be planned."""
        self.schedule: UpdateSchedule | None = None
        """Of the subgroups in host memory, in their order."""

    def take(self, update: Update, numbers: Sequence[int], subgroups: Laid) -> list[int]:
        """Queue what is the device's of these subgroups; return the numbers of the others.

        `wait()` is to be called, whatever happens.
        """
        if self._planned_for != len(subgroups):
            self.plan(subgroups)
        rest = []
        for number in numbers:
            subgroup, states = subgroups[number]
            if states in self._moved:
                self._queue(subgroup, states, update)
                update.done.add(number)
            else:
                rest.append(number)
        return rest

    def wait(self) -> None:
        """Return when all that was queued is back in host memory."""
        while self._under_way:
            self._under_way.pop().synchronize()

    def memory_bytes(self) -> int:
        """Return what is set aside on the device."""
        return sum(buffer.nbytes for buffer, _ in self._free)

    def close(self) -> None:
        """Give the memory back, once nothing comes or goes."""
        try:
            self.wait()
        finally:
            while self._pinned:
                self._device.unpin(self._pinned.pop())
            self._free.clear()

    def plan(self, subgroups: Laid) -> None:
        """Say which subgroups are the device's, and have the memory for them.

        None where it has no room: the host updates all then, and a warning says so.
        """
        try:
            self._plan(subgroups)
        except torch.OutOfMemoryError as error:
            self._moved, self._free = set(), deque()
            _log.warning("the host updates all that lies there: the device has no room (%s)", error)
        self._planned_for = len(subgroups)

    def _plan(self, subgroups: Laid) -> None:
        here = [(each, states) for each, states in subgroups if isinstance(states, HostStates)]
        self._moved, self.schedule = set(), None
        if not here:
            return
        sizes = [subgroup.count for subgroup, _ in here]
        if self._wanted == "auto":
            if self.rates is None:
                dtype = here[0][0].pieces[0].param.dtype
                rates = measure_rates(self._device, self._pool, max(sizes), dtype)
                self.rates = replace(rates, params_on="host")
            self.schedule = plan_updates(sizes, self.rates)
        else:
            self.schedule = named_schedule(self._wanted, sizes)
        for (_, states), place in zip(here, self.schedule.places, strict=True):
            if place == "moved":
                self._moved.add(states)
                self._pin(states)
        if self._moved and (not self._free or self._free[0][0].numel() < _ROWS * max(sizes)):
            buffers = [
                torch.empty(_ROWS * max(sizes), device=self._device.device)
                for _ in range(self.schedule.buffers)
            ]
            self._free = deque((each, (self._device.ready(),)) for each in buffers)

    def _pin(self, states: States) -> None:
        rows = states.read()
        if rows.data_ptr() not in self._pinned and self._device.pin(rows.data_ptr(), rows.nbytes):
            self._pinned.append(rows.data_ptr())

    def _queue(self, subgroup: Subgroup, states: States, update: Update) -> None:
        """Queue one subgroup's way there, its update and its way back."""
        flat = update.gradients.flat
        pieces = [piece for piece in subgroup.pieces if piece.param in flat]
        rows = states.begin()
        if subgroup.has_master:
            for piece in pieces:
                if piece.param in update.stale:
                    renew_master(piece.inside(rows[2]), piece.of(piece.param.detach()))
        update.has_changed = True  # or may have
        buffer, free = self._free[0]
        grads, params, *_ = buffer.view(_ROWS, -1)
        near = buffer[2 * grads.numel() :][: rows.numel()].view(rows.shape)
        came = [self._device.copy("states in", rows, near, free)]
        arrays = []
        for piece in pieces:
            far = flat[piece.param][piece.begin : piece.end]
            grad = _within(grads, piece, far.dtype)
            came.append(self._device.copy("states in", far, grad, free))
            param = piece.of(piece.param.detach())
            beside = _within(params, piece, param.dtype)
            if not subgroup.has_master:  # which is what is trained, and comes along
                came.append(self._device.copy("states in", param, beside, free))
            arrays.append((piece, param, _arrays(near, piece, grad, beside)))
        left: list[Moment] = []
        settings = update.settings[subgroup.group]
        for piece, param, on_device in arrays:
            step = update.steps[piece.param]
            done = self._device.update(settings, step, on_device, clip=update.clip, after=came)
            came = [done]
            source = on_device.master_param if on_device.param is None else on_device.param
            left.append(self._device.copy("states out", source, param, (done,)))
        left.append(self._device.copy("states out", near, rows, came))
        self._under_way += left
        self._free.popleft()
        self._free.append((buffer, tuple(left)))


def _within(row: torch.Tensor, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    """Return a piece's place in a row, as elements of `dtype`: where the widest would begin."""
    count = piece.end - piece.begin
    return row[piece.at : piece.at + count].view(dtype)[:count]


def _arrays(rows: torch.Tensor, piece: Piece, grad: torch.Tensor, param: torch.Tensor) -> Arrays:
    state = [piece.inside(row) for row in rows]
    if len(state) < 3:  # the parameter is its own master
        return Arrays(grad, param, state[0], state[1], None)
    return Arrays(grad, state[2], state[0], state[1], param)


def made_of(
    device: UpdateDevice | None,
    pool: ThreadPool,
    config: OptimizerConfig,
    beside: UpdateDevice | None,
) -> LentDevice | None:
    """Return `device` as lent; raise ValueError where parameters lie on a device themselves."""
    if device is not None and beside is not None:
        raise ValueError(
            "lent_device updates what lies in host memory, and these parameters lie on a device, "
            "which updates them anyway: leave it out"
        )
    return None if device is None else LentDevice(device, pool, config)
