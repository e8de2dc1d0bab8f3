"""Which schedule a forward follows: recorded, planned, and planned again when the drive changes.

The first forward of a kind offloads everything large and is recorded. From the next on, forwards
that save the same sizes in the same order follow what was planned for it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median
from time import perf_counter
from typing import NamedTuple

from offload.activations.blocks import BlockBook, BlockKey, BlockRuns
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
# A pause between two forwards, to validate say, shall not count.
_PERIODS = 9
# Shorter measurements say nothing about a drive.
_LEAST_BYTES, _LEAST_BUSY_S = 8 << 20, 2e-3
# However little came through, after so long it is all that the drive does.
_LONG_BUSY_S = 0.05
# After so many backwards without a measurement a little goes out to have one.
_PROBED_AFTER = 16


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

    def trace(self, sizes: Sequence[int], transients: Iterable[tuple[int, int]] = ()) -> Trace:
        """Return what was recorded of regions with these sizes.

        Behind them stand `transients`: bytes that cannot leave, from the first need of a region
        until the next one is needed.
        """
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
        needs = sorted(tensor.needed_s for tensor in tensors)
        passing = []
        for number, nbytes in transients:
            needed_s = max(saved_s, tensors[number].needed_s)
            after = bisect_right(needs, needed_s)
            end_s = needs[after] if after < len(needs) else max(needed_s, latest_s - begin_s)
            passing.append(SavedTensor(nbytes, needed_s, end_s, end_s, held=True))
        passing.sort(key=lambda tensor: tensor.saved_s)
        return Trace((*tensors, *passing))


@dataclass(frozen=True, eq=False)
class Plan:
    """What a forward with these region sizes does."""

    sizes: tuple[int, ...]
    stays: tuple[bool, ...]
    order: tuple[int, ...]
    """Of the regions, as the backward wants them."""
    due: tuple[int, ...]
    """For each place in `order`: the last place whose read has begun by then."""
    schedule: ActivationSchedule
    throughput: Throughput
    """What the drive was taken to do."""
    confirmed: bool
    """Made from a step that was not the first of its kind, which is slower than the others."""


@dataclass
class _Entry:
    order: list[int]
    trace: Trace | None = None
    key: BlockKey | None = None
    """Of the forward's blocks, where some are recomputed."""
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
    write_bytes_per_s: float
    """What the drive may be given without end, for the sake of its life."""
    follow: bool
    """False: everything large is offloaded, and only orders are remembered."""
    stall_s: Callable[[], float] = lambda: 0.0
    """For how long training has waited for I/O."""
    _entries: OrderedDict[tuple[int, ...], _Entry] = field(default_factory=OrderedDict)
    _seen: list[float] = field(default_factory=lambda: [0.0] * 4)
    blocks: BlockBook = field(init=False)
    throughput: Throughput | None = None
    _begun_s: float = math.nan
    _periods_s: deque[float] = field(default_factory=lambda: deque(maxlen=_PERIODS))
    """From the begin of one forward to that of the next, the last few times."""
    planning_s: float = 0.0
    """How long all planning took: it is none of the step's own time."""
    probe_bytes: int = 0
    """So many leave whatever the plan says, because nothing has for long."""
    _unseen: int = 0
    forwards: int = 0
    planned: int = 0
    """How often a schedule was made."""
    record_next: bool = False
    """The last forward turned out to be of no known kind when it was late to record it."""

    def __post_init__(self) -> None:
        """Open the book of blocks."""
        self.blocks = BlockBook(self.memory_bytes)

    def plan_like(self, sizes: Sequence[int]) -> Plan | None:
        """Return the plan used last whose first sizes are these; it is made when first asked for.

        Not before, since there may be many kinds of forward, and some come only once.
        """
        count = len(sizes)
        begun = tuple(sizes)
        for key, entry in reversed(self._entries.items()):
            if key[:count] == begun:
                self._renew(key, entry)
                if entry.plan is not None:
                    return entry.plan
        return None

    def order_of(self, sizes: tuple[int, ...]) -> list[int] | None:
        """Return the order in which the last such backward used its regions."""
        entry = self._entries.get(sizes)
        return entry.order if entry is not None else None

    def learn(
        self,
        sizes: tuple[int, ...],
        order: list[int],
        recording: Recording | None,
        depth: int,
        runs: BlockRuns | None = None,
    ) -> None:
        """Remember how a whole backward went, and the blocks of its forward.

        `order` is of its regions, `depth` how many forwards were under way with it.
        """
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
            transients = self.blocks.transients(runs) if runs is not None else ()
            entry.trace, entry.depth, entry.stale = recording.trace(sizes, transients), depth, True
            entry.recordings += 1
            self.record_next = False
            if runs is not None and runs.recompute:
                entry.key = runs.key
            elif runs is not None and entry.recordings > 1:
                self.blocks.learn(runs, entry.trace, depth)

    def recompute_of(self, key: BlockKey) -> frozenset[int]:
        """Return the numbers of the blocks that this kind of forward recomputes."""
        if self._knows_drive():
            begin_s = perf_counter()
            self.blocks.renew(key, self._machine)
            self.planning_s += perf_counter() - begin_s
        return self.blocks.recompute_of(key)

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
            self._unseen = -1
        self.throughput = Throughput(*rates)
        # A drive to which nothing goes is not seen to have become faster.
        self._unseen += 1
        if self._unseen >= _PROBED_AFTER:
            self._unseen, self.probe_bytes = 0, _LEAST_BYTES
        for entry in self._entries.values():
            if entry.plan is None or entry.uses < entry.patience:
                continue
            if self._differs(entry.plan.throughput):
                entry.stale = True
                self.blocks.drive_changed()

    def _differs(self, planned: Throughput) -> bool:
        assert self.throughput is not None
        return any(
            abs(now / then - 1) > _CHANGED
            for now, then in zip(self.throughput, planned, strict=True)
            if not math.isnan(now)
        )

    def idle_s(self) -> float:
        """Return for how long training has waited for I/O or for a plan."""
        return self.stall_s() + self.planning_s

    def begin(self, now_s: float) -> None:
        """Take in that a forward begins at this time."""
        self.forwards += 1
        if not math.isnan(self._begun_s):
            self._periods_s.append(now_s - self._begun_s)
        self._begun_s = now_s

    def _knows_drive(self) -> bool:
        known = self.throughput
        return self.follow and known is not None and not math.isnan(known.write_bytes_per_s)

    def _renew(self, sizes: tuple[int, ...], entry: _Entry) -> None:
        """Plan what was recorded, or planned for another drive than it has become."""
        if not entry.stale or entry.trace is None or not self._knows_drive():
            return
        begin_s = perf_counter()
        entry.plan = self._planned(sizes, entry, entry.trace)
        entry.stale, entry.uses = False, 0
        entry.patience = min(2 * entry.patience, _MOST_PATIENT)
        if entry.key is not None:
            self.blocks.missed(entry.key, entry.plan.schedule.peak_bytes)
        self.planning_s += perf_counter() - begin_s

    def _machine(self, depth: int) -> tuple[list[Channel], Limits]:
        """Return what each of `depth` forwards that are under way together may use."""
        assert self.throughput is not None
        write, read = self.throughput
        share = _RELIED_ON / depth
        channel = Channel(
            tier="ssd",
            write_bytes_per_s=write * share,
            # Until anything was read, take the drive to read as fast as it writes.
            read_bytes_per_s=(write if math.isnan(read) else read) * share,
            capacity_bytes=self.spill_bytes / depth,
            written_bytes=self._written_bytes(),
        )
        return [channel], Limits(staging_bytes=self.staging_bytes / depth)

    def _written_bytes(self) -> float:
        """Return what one forward may write."""
        if self.write_bytes_per_s == math.inf or not self._periods_s:
            return math.inf
        return self.write_bytes_per_s * median(self._periods_s)

    def _planned(self, sizes: tuple[int, ...], entry: _Entry, trace: Trace) -> Plan:
        assert self.throughput is not None
        channels, limits = self._machine(entry.depth)
        schedule = plan_activations(trace, channels, limits, self.memory_bytes)
        self.planned += 1
        count = len(sizes)
        order = [number for number in schedule.order if number < count]
        place = {number: at for at, number in enumerate(order)}
        begun = [
            max((place[number] for number in some), default=-1) for some in schedule.reads_before
        ]
        due = zip(schedule.order, accumulate(begun, max), strict=True)
        write, read = self.throughput
        return Plan(
            sizes=sizes,
            stays=tuple(tier == "device" for tier in schedule.tiers[:count]),
            order=tuple(order),
            due=tuple(last for number, last in due if number < count),
            schedule=schedule,
            throughput=Throughput(write, write if math.isnan(read) else read),
            confirmed=entry.recordings > 1,
        )
