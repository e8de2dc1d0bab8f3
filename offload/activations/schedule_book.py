"""Which schedule a forward follows: recorded, planned, and planned again when the drive changes.

The first forward of a kind offloads everything large and is recorded. From the next on, forwards
that save the same sizes in the same order follow what was planned for it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from time import perf_counter
from typing import NamedTuple

from perfmodel.schedules.activations import ActivationSchedule, plan_activations
from perfmodel.schedules.trace import Channel, Limits, SavedTensor, Trace

__all__ = ["Plan", "Recording", "ScheduleBook", "Throughput"]

# How many kinds of forward (bucketed sequence lengths, say) are remembered.
_REMEMBERED = 64
# What a drive has shown is not what it does every time: a part of it stays in reserve.
_RELIED_ON = 0.8
# A drive this much faster or slower than it was planned with is planned with again.
_CHANGED = 0.2
_MOST_PATIENT = 64
# Shorter measurements say nothing about a drive.
_LEAST_BYTES, _LEAST_BUSY_S = 8 << 20, 2e-3
# However little came through, after so long it is all that the drive does.
_LONG_BUSY_S = 0.05


class Throughput(NamedTuple):
    """Bytes a second, while there was anything to do."""

    write_bytes_per_s: float
    read_bytes_per_s: float


class Recording:
    """When each region of a forward was saved, wanted and released; without the time of stalls."""

    def __init__(self, stall_s: Callable[[], float]) -> None:
        self._stall_s = stall_s
        self.saved_s: list[float] = []
        self.needed_s: dict[int, float] = {}
        self.released_s: dict[int, float] = {}
        self.held: set[int] = set()

    def now_s(self) -> float:
        """Return the time as it would be had nobody waited for I/O."""
        return perf_counter() - self._stall_s()

    def trace(self, sizes: Sequence[int]) -> Trace:
        """Return what was recorded of regions with these sizes."""
        begin_s = self.saved_s[0]
        latest_s = max(self.released_s.values(), default=begin_s)
        tensors = []
        saved_s = 0.0
        for number, nbytes in enumerate(sizes):
            # Stalls are known only as well as their clock: times must not run backwards.
            saved_s = max(saved_s, self.saved_s[number] - begin_s)
            released_s = max(saved_s, self.released_s.get(number, latest_s) - begin_s)
            needed_s = self.needed_s.get(number, released_s + begin_s) - begin_s
            needed_s = min(max(saved_s, needed_s), released_s)
            held = number in self.held
            tensors.append(SavedTensor(nbytes, saved_s, needed_s, released_s, held))
        return Trace(tuple(tensors))


@dataclass(frozen=True, eq=False)
class Plan:
    """What a forward with these region sizes does."""

    sizes: tuple[int, ...]
    stays: tuple[bool, ...]
    due: tuple[int, ...]
    """For each place in the schedule's order: the last place whose read has begun by then."""
    schedule: ActivationSchedule
    throughput: Throughput
    """What the drive was taken to do."""
    confirmed: bool
    """Made from a step that was not the first of its kind, which is slower than the others."""


@dataclass
class _Entry:
    order: list[int]
    trace: Trace | None = None
    plan: Plan | None = None
    stale: bool = False
    depth: int = 1
    recordings: int = 0
    uses: int = 0
    """Of the plan. Planning takes time: each plan is followed at least `patience` times."""
    patience: int = 1


@dataclass
class ScheduleBook:
    """The plans of all kinds of forward of one instance. Its owner's lock guards it."""

    staging_bytes: int
    spill_bytes: float
    memory_bytes: int | None
    follow: bool
    """False: everything large is offloaded, and only orders are remembered."""
    _entries: OrderedDict[tuple[int, ...], _Entry] = field(default_factory=OrderedDict)
    _seen: list[float] = field(default_factory=lambda: [0.0] * 4)
    throughput: Throughput | None = None
    planned: int = 0
    """How often a schedule was made."""
    record_next: bool = False
    """The last forward turned out to be of no known kind when it was late to record it."""

    def plan_like(self, sizes: Sequence[int]) -> Plan | None:
        """Return the plan used last whose first sizes are these."""
        count = len(sizes)
        begun = tuple(sizes)
        for entry in reversed(self._entries.values()):
            plan = entry.plan
            if plan is not None and plan.sizes[:count] == begun:
                return plan
        return None

    def order_of(self, sizes: tuple[int, ...]) -> list[int] | None:
        """Return the order in which the last such backward used its regions."""
        entry = self._entries.get(sizes)
        return entry.order if entry is not None else None

    def learn(
        self, sizes: tuple[int, ...], order: list[int], recording: Recording | None, depth: int
    ) -> None:
        """Remember how a whole backward went."""
        entry = self._entries.get(sizes)
        if entry is None:
            entry = self._entries[sizes] = _Entry(order)
        entry.order = order
        self._entries.move_to_end(sizes)
        if len(self._entries) > _REMEMBERED:
            self._entries.popitem(last=False)
        entry.uses += 1
        confirmed = entry.plan is not None and entry.plan.confirmed
        if recording is not None and recording.needed_s and not confirmed:
            if entry.trace is not None:
                # What stays cannot be seen to be held by others.
                tensors = enumerate(entry.trace.tensors)
                recording.held |= {number for number, tensor in tensors if tensor.held}
            entry.trace, entry.depth, entry.stale = recording.trace(sizes), depth, True
            entry.recordings += 1
            self.record_next = False

    def observe(self, write: tuple[float, float], read: tuple[float, float]) -> None:
        """Take in what the drive has done so far: bytes and busy seconds of both directions."""
        seen = (*write, *read)
        rates = []
        for at, before in ((0, "write_bytes_per_s"), (2, "read_bytes_per_s")):
            nbytes, busy_s = seen[at] - self._seen[at], seen[at + 1] - self._seen[at + 1]
            known = getattr(self.throughput, before) if self.throughput is not None else math.nan
            if busy_s < _LEAST_BUSY_S or (nbytes < _LEAST_BYTES and busy_s < _LONG_BUSY_S):
                rates.append(known)
                continue
            rate = max(nbytes, 1.0) / busy_s
            rates.append(rate if math.isnan(known) else (rate + known) / 2)
            self._seen[at : at + 2] = seen[at : at + 2]
        self.throughput = Throughput(*rates)
        for entry in self._entries.values():
            if entry.plan is None or entry.uses < entry.patience:
                continue
            if self._differs(entry.plan.throughput):
                entry.stale = True

    def _differs(self, planned: Throughput) -> bool:
        assert self.throughput is not None
        return any(
            abs(now / then - 1) > _CHANGED
            for now, then in zip(self.throughput, planned, strict=True)
            if not math.isnan(now)
        )

    def renew(self) -> None:
        """Plan what was recorded, or planned for another drive than it has become."""
        throughput = self.throughput
        if not self.follow or throughput is None or math.isnan(throughput.write_bytes_per_s):
            return
        for sizes, entry in self._entries.items():
            if entry.stale and entry.trace is not None:
                entry.plan = self._planned(sizes, entry, entry.trace, throughput)
                entry.stale, entry.uses = False, 0
                entry.patience = min(2 * entry.patience, _MOST_PATIENT)

    def _planned(
        self, sizes: tuple[int, ...], entry: _Entry, trace: Trace, throughput: Throughput
    ) -> Plan:
        write, read = throughput
        if math.isnan(read):  # nothing was read yet: take the drive to read as fast as it writes
            read = write
        # Forwards that are under way together share the drive.
        share = _RELIED_ON / entry.depth
        channel = Channel(
            tier="ssd",
            write_bytes_per_s=write * share,
            read_bytes_per_s=read * share,
            capacity_bytes=self.spill_bytes / entry.depth,
        )
        limits = Limits(staging_bytes=self.staging_bytes / entry.depth)
        schedule = plan_activations(trace, [channel], limits, self.memory_bytes)
        self.planned += 1
        place = {number: at for at, number in enumerate(schedule.order)}
        begun = [
            max((place[number] for number in some), default=-1) for some in schedule.reads_before
        ]
        return Plan(
            sizes=sizes,
            stays=tuple(tier == "device" for tier in schedule.tiers),
            due=tuple(accumulate(begun, max)),
            schedule=schedule,
            throughput=Throughput(write, read),
            confirmed=entry.recordings > 1,
        )
