"""The optimizer beside a device: which states lie there, and where each subgroup is updated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offload.config import OptimizerConfig
from offload.device.updates import UpdateDevice
from offload.native import ThreadPool
from offload.optimizer.calibration import measure_rates
from offload.optimizer.gradients import Gradients, StepGradients
from offload.optimizer.interleaved import Interleaved, Job
from offload.optimizer.interruption import Uninterrupted
from offload.optimizer.layout import Piece, Subgroup
from offload.optimizer.states import HostStates, SsdStates, States, renew_master
from offload.optimizer.update import Update
from perfmodel.schedules.updates import UpdateRates, UpdateSchedule, named_schedule, plan_updates

__all__ = ["DeviceSide"]

# How many subgroups that the host updates have their gradients and parameters in host memory.
_SLOTS = 3


class DeviceSide:
    """What an optimizer has on one device, and its schedule, which is planned at the first step."""

    def __init__(self, device: UpdateDevice, pool: ThreadPool, config: OptimizerConfig) -> None:
        self._device, self._pool = device, pool
        self._wanted = config.update_schedule
        self._gradient_bytes, self._staging_bytes = config.gradient_bytes, config.staging_bytes
        self._resident: set[States] = set()
        self._pinned: list[int] = []
        self._engine: Interleaved | None = None
        self._places: dict[States, str] = {}
        self.rates: UpdateRates | None = None
        """As they were measured; None where the schedule was not asked to be planned."""
        self.schedule: UpdateSchedule | None = None

    def states_of(self, subgroup: Subgroup, *, resident: bool) -> States:
        """Return the states of a subgroup on the device, or in host memory that is pinned."""
        if resident:
            states = HostStates(subgroup, self._device.device)
            self._resident.add(states)
            return states
        states = HostStates(subgroup)
        rows = states.read()
        if self._device.pin(rows.data_ptr(), rows.nbytes):
            self._pinned.append(rows.data_ptr())
        return states

    def replan(self) -> None:
        """Have the next step be planned anew, for subgroups that are more than there were."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def free_bytes(self) -> int:
        """Return how much memory the device has left."""
        return self._device.free_bytes()

    def settle(self) -> None:
        """Wait until states that the device has updated are where the host may look at them."""
        if self._engine is not None:
            self._engine.settle()

    def finish(
        self,
        update: Update,
        subgroups: Sequence[tuple[Subgroup, States]],
        gradients: Gradients,
        signals: Uninterrupted,
    ) -> None:
        """Do what is left of an update. Raises OSError where states cannot be read.

        From the first one on, `gradients` know which of them leave for the host.
        """
        if not subgroups:
            return
        order = sorted(
            range(len(subgroups)), key=lambda number: subgroups[number][1] in self._resident
        )
        if self._engine is None:
            self._plan([subgroups[number] for number in order])
            gradients.leave_for_host(self._leaving(subgroups, gradients))
            self._bring_back(update.gradients, subgroups)
        assert self._engine is not None
        jobs: dict[int, Job] = {}
        for number in order:
            if number not in update.done:
                job = self._job(*subgroups[number], update)
                if job is None:
                    update.done.add(number)
                else:
                    jobs[number] = job
        update.has_changed = True  # or may have
        self._engine.run(jobs, update.clip, update, signals)

    def _job(self, subgroup: Subgroup, states: States, update: Update) -> Job | None:
        flat, on_host = update.gradients.flat, update.gradients.on_host
        pieces = [piece for piece in subgroup.pieces if piece.param in flat]
        if not pieces:
            return None

        def grad_of(piece: Piece) -> torch.Tensor:
            return flat[piece.param][piece.begin : piece.end]

        def on_host_of(piece: Piece) -> torch.Tensor | None:
            taken = on_host.get(piece.param)
            return None if taken is None else taken[piece.begin : piece.end]

        stale = [piece for piece in pieces if subgroup.has_master and piece.param in update.stale]
        place = self._places[states]
        for piece in stale if place != "host" else ():
            self.settle()
            renew_master(piece.inside(states.begin()[2]), piece.of(piece.param.detach()))
        return Job(
            place,
            states,
            pieces,
            update.settings[subgroup.group],
            update.steps,
            grad_of,
            on_host_of,
            stale if place == "host" else (),  # begun only when their turn comes
        )

    def _leaving(
        self, subgroups: Sequence[tuple[Subgroup, States]], gradients: Gradients
    ) -> list[torch.Tensor]:
        """Return parameters of which no piece is updated on the device.

        As many as there may be host memory for.
        """
        elsewhere = self._on_device(subgroups)
        on_ssd = {
            piece.param
            for subgroup, states in subgroups
            if isinstance(states, SsdStates)
            for piece in subgroup.pieces
        }
        all_count = self._gradient_bytes is not None
        left = self._staging_bytes if self._gradient_bytes is None else self._gradient_bytes
        if all_count or on_ssd:
            left -= gradients.buffer_bytes
        leaving: list[torch.Tensor] = []
        for param in dict.fromkeys(piece.param for each, _ in subgroups for piece in each.pieces):
            counts = gradients.host_bytes_of(param) if all_count or param in on_ssd else 0
            if param not in elsewhere and counts <= left:
                leaving.append(param)
                left -= counts
        return leaving

    def _on_device(self, subgroups: Sequence[tuple[Subgroup, States]]) -> set[torch.Tensor]:
        return {
            piece.param
            for subgroup, states in subgroups
            if self._places[states] != "host"
            for piece in subgroup.pieces
        }

    def _bring_back(
        self, gradients: StepGradients, subgroups: Sequence[tuple[Subgroup, States]]
    ) -> None:
        """Have gradients on the device that left it while another schedule was in force."""
        for param in self._on_device(subgroups) & gradients.on_host.keys():
            elements = gradients.on_host.pop(param)
            if gradients.flat[param] is elements:
                gradients.flat[param] = elements.to(self._device.device)

    def _plan(self, subgroups: Sequence[tuple[Subgroup, States]]) -> None:
        sizes = [subgroup.count for subgroup, _ in subgroups]
        held = sum(subgroup.count for subgroup, states in subgroups if states in self._resident)
        resident = held / sum(sizes)
        if self._wanted == "auto":
            dtype = _most_common_dtype(subgroups)
            self.rates = measure_rates(self._device, self._pool, max(sizes), dtype)
            self.schedule = plan_updates(sizes, self.rates, resident=resident)
        else:
            self.schedule = named_schedule(self._wanted, sizes, resident=resident)
        self._places = {
            states: "host" if isinstance(states, SsdStates) else place
            for (_, states), place in zip(subgroups, self.schedule.places, strict=True)
        }
        self._engine = Interleaved(
            self._device, self._pool, max(sizes), buffers=self.schedule.buffers, slots=_SLOTS
        )

    def memory_bytes(self) -> int:
        """Return what is set aside on both sides for what is on its way."""
        return self._engine.memory_bytes() if self._engine is not None else 0

    def close(self) -> None:
        """Give the pinned memory back."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        while self._pinned:
            self._device.unpin(self._pinned.pop())


def _most_common_dtype(subgroups: Sequence[tuple[Subgroup, States]]) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for subgroup, _ in subgroups:
        for piece in subgroup.pieces:
            count = counts.get(piece.param.dtype, 0) + piece.end - piece.begin
            counts[piece.param.dtype] = count
    return max(counts, key=lambda dtype: counts[dtype])
