"""A forward and its backward on one rank, with saved tensors kept, computed again, or moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from perfmodel.machine import Machine
from perfmodel.memory import step_bytes
from perfmodel.operator_times import OperatorTimes
from perfmodel.schedules.activations import ActivationSchedule, plan_activations
from perfmodel.schedules.slowdown import Slowdowns
from perfmodel.schedules.stall import stall_s
from perfmodel.schedules.trace import Channel, Limits
from perfmodel.step_trace import StepTrace, step_trace
from perfmodel.tape import Tape
from perfmodel.workload import Strategy

__all__ = [
    "WINDOW_TENSORS",
    "ActivationStep",
    "UnderWay",
    "activation_step",
    "channels_of",
    "limited",
    "of_each",
    "processor_s",
    "repeated",
    "run_again",
    "staged",
    "under_way",
]

WINDOW_TENSORS = 2
"""On their way at once, of the largest, where nobody says how many."""


@dataclass(frozen=True, kw_only=True)
class ActivationStep:
    """What one forward and backward take, of time and of each tier."""

    forward_s: float
    backward_s: float
    recompute_s: float = 0.0
    stall_s: float = 0.0
    """Waiting for transfers."""
    processor_s: float = 0.0
    """What moving bytes takes of a processor that would compute meanwhile."""
    device_bytes: int
    """The most in use at once, parameters, their gradients and states apart."""
    saved_bytes: int = 0
    """Of those, what a forward leaves for its backward."""
    staging_bytes: int = 0
    """Of the host, on the way to the SSD and back; on a machine without a link of the device."""
    host_bytes: int = 0
    ssd_bytes: int = 0
    schedule: ActivationSchedule | None = None
    first: ActivationStep | None = None
    """What a pipeline's first stage takes, where this is its last, which has the head besides."""

    @property
    def duration_s(self) -> float:
        """All of it."""
        computing_s = self.forward_s + self.backward_s + self.recompute_s
        return computing_s + self.stall_s + self.processor_s

    @property
    def moved_bytes(self) -> int:
        """Written, and read again, by the stage that moves most."""
        return max(each.host_bytes + each.ssd_bytes for each in self._stages)

    @property
    def written_bytes(self) -> int:
        """Of those, what the SSD gets."""
        return max(each.ssd_bytes for each in self._stages)

    @property
    def _stages(self) -> tuple[ActivationStep, ...]:
        return (self,) if self.first is None else (self.first, self)


@dataclass(frozen=True)
class UnderWay:
    """What activations of all micro-batches take at once."""

    device_bytes: int
    host_bytes: int
    """Without staging."""
    ssd_bytes: int


def under_way(step: ActivationStep, forwards: tuple[float, float]) -> UnderWay:
    """Return what the stage takes that has the most, of each tier.

    `forwards`: of so many the first stage has what is saved, and of so many the last; these are
    saved by layers alone but for the one that the head works on.
    """
    ahead = step.first or step
    first, last = (count - 1 for count in forwards)

    def most(mine: int, behind: int, more: int) -> int:
        return max(mine + round(first * more), behind + round(last * more))

    return UnderWay(
        most(ahead.device_bytes, step.device_bytes, ahead.saved_bytes),
        most(ahead.host_bytes, step.host_bytes, ahead.host_bytes),
        most(ahead.ssd_bytes, step.ssd_bytes, ahead.ssd_bytes),
    )


def staged(last: ActivationStep, first: ActivationStep) -> ActivationStep:
    """Return the step of a pipeline's last stage, which waits for the first if that is slower."""
    waited_s = max(0.0, first.duration_s - last.duration_s)
    return replace(last, stall_s=last.stall_s + waited_s, first=first)


def of_each(strategy: Strategy, forwards: float) -> Strategy:
    """Return a strategy in which each of so many forwards under way has its part of the memory."""
    if strategy.memory_bytes is None or forwards == 1:
        return strategy
    return replace(strategy, memory_bytes=int(strategy.memory_bytes / forwards))


def activation_step(
    tape: Tape, times: OperatorTimes, machine: Machine, strategy: Strategy, *, effort: float = 0.2
) -> ActivationStep:
    """Return what a forward and backward of `tape` take on one of `machine`'s devices.

    `effort`: as for `plan_activations`. Raises ValueError where the machine lacks what the
    strategy moves tensors to.
    """
    forward_s, backward_s = sum(times.forward_s), sum(times.backward_s)
    recompute = repeated(tape, strategy)
    again_s = sum(sum(times.forward_s[at] for at in run_again(tape, block)) for block in recompute)
    if strategy.activations in ("keep", "recompute"):
        in_use = step_bytes(tape, recompute)
        return ActivationStep(
            forward_s=forward_s,
            backward_s=backward_s,
            recompute_s=again_s,
            device_bytes=in_use.worst.nbytes,
            saved_bytes=in_use.saved_bytes,
        )
    channel = channels_of(machine, strategy.activations)
    found = step_trace(tape, times, strategy.min_tensor_bytes, recompute)
    limits = _limits(machine, strategy, found)
    room = strategy.memory_bytes
    slowdowns = Slowdowns(found.trace, [channel], limits)
    schedule = limited(found, channel, limits, room, effort, slowdowns)
    tiers = zip(found.storages, schedule.tiers, strict=True)
    moved = {storage for storage, tier in tiers if tier != "device"}
    in_use = step_bytes(tape, recompute, leaves=lambda value: value.storage in moved)
    to_ssd = strategy.activations == "ssd"
    staging = strategy.staging_bytes if to_ssd else 0
    on_device = staging if machine.link is None else schedule.window_bytes
    waited_s = stall_s(schedule, found.trace, [channel], limits, math.inf if room is None else room)
    filled_bytes = 0
    if room is not None and machine.link is None:  # a run moves no more than the limit asks for
        moments = step_bytes(tape, recompute).moments
        filled_bytes = max(each.other_bytes + min(each.saved_bytes, room) for each in moments)
    return ActivationStep(
        forward_s=forward_s,
        backward_s=backward_s,
        recompute_s=again_s,
        stall_s=waited_s,
        processor_s=(processor_s(machine, 2 * schedule.moved_bytes, len(moved)) if to_ssd else 0.0),
        device_bytes=max(in_use.worst.nbytes, filled_bytes) + on_device,
        saved_bytes=in_use.saved_bytes,
        staging_bytes=staging if machine.link is not None else 0,
        host_bytes=0 if to_ssd else schedule.moved_bytes,
        ssd_bytes=schedule.moved_bytes if to_ssd else 0,
        schedule=schedule,
    )


def repeated(tape: Tape, strategy: Strategy) -> Sequence[int]:
    """Return the numbers of the blocks that a strategy has computed again."""
    if strategy.recompute is not None:
        return [number for number in strategy.recompute if number < len(tape.blocks)]
    return range(len(tape.blocks)) if strategy.activations == "recompute" else ()


def channels_of(machine: Machine, tier: str) -> Channel:
    """Return one rank's way to `tier`. Raises ValueError where the machine has none."""
    link, drive, ranks = machine.link, machine.drive, machine.devices
    if tier == "host":
        if link is None:
            raise ValueError(
                f"activations='host' would save nothing on {machine.name!r}: its device's memory "
                "is the host's; use ssd, recompute or keep"
            )
        return Channel(
            tier="host",
            write_bytes_per_s=link.to_host_bytes_per_s,
            read_bytes_per_s=link.to_device_bytes_per_s,
            mixed_bytes_per_s=link.both_bytes_per_s,
            staged=False,
        )
    if drive is None:
        raise ValueError(
            f"activations='ssd' needs a drive, and {machine.name!r} has none: add `drive` to its "
            "machine.json (offload calibrate PATH measures it)"
        )
    out, back = (
        (math.inf, math.inf)
        if link is None
        else (
            link.to_host_bytes_per_s,
            link.to_device_bytes_per_s,
        )
    )
    return Channel(
        tier="ssd",
        write_bytes_per_s=min(drive.write_bytes_per_s / ranks, out),
        read_bytes_per_s=min(drive.read_bytes_per_s / ranks, back),
        mixed_bytes_per_s=drive.mixed_bytes_per_s / ranks,
    )


def run_again(tape: Tape, number: int) -> range:
    """Return the operators of a block that are run again: until all that it saves is there.

    What an operator saves of its inputs it saves before it computes anything.
    """
    block = tape.blocks[number]
    last = max((at for at in block if tape.operators[at].saves), default=block[0] - 1)
    operator = tape.operators[max(last, 0)]
    read = {value.storage for value in operator.reads}
    computes = any(value.storage not in read for value in operator.saves)
    return range(block[0], last + computes)


def _limits(machine: Machine, strategy: Strategy, found: StepTrace) -> Limits:
    largest = max((tensor.nbytes for tensor in found.trace.tensors), default=0)
    window = math.inf if machine.link is None else float(WINDOW_TENSORS * largest)
    return Limits(
        staging_bytes=strategy.staging_bytes if strategy.activations == "ssd" else math.inf,
        window_bytes=window,
    )


def limited(
    found: StepTrace,
    channel: Channel,
    limits: Limits,
    memory_bytes: int | None,
    effort: float,
    slowdowns: Slowdowns,
) -> ActivationSchedule:
    """Return the schedule in which what `found` saves has `memory_bytes`, at whatever time.

    None: as little as it needs without a wait. `slowdowns`: those of its trace.
    """
    if memory_bytes is None:
        return plan_activations(found.trace, [channel], limits, effort=effort)
    left = max(0, memory_bytes - found.small_bytes)
    schedule = plan_activations(found.trace, [channel], limits, left, effort=effort)
    return slowdowns.to_fit(schedule, left, effort)


def processor_s(machine: Machine, nbytes: int, tensors: float) -> float:
    """Return by how much so many `tensors` that go to the SSD and back hold a processor up.

    It copies and checks their `nbytes`, those of both ways together, and computes as well.
    """
    drive, cores = machine.drive, machine.host.cores
    if machine.link is not None or drive is None:
        return 0.0
    if drive.beside_bytes_per_s:
        return nbytes / drive.beside_bytes_per_s + tensors * drive.beside_s
    if drive.processor_bytes_per_s:
        return nbytes / drive.processor_bytes_per_s / cores
    return 0.0
