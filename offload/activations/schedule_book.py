"""Which schedule a forward follows: recorded, planned, and planned again when the drive changes.

The first forward of a kind offloads everything large and is recorded. From the next on, forwards
that save the same sizes in the same order follow what was planned for it.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from statistics import median
from time import perf_counter

from offload.activations.blocks import BlockBook, BlockKey, BlockRuns
from offload.activations.plan import Plan
from offload.activations.rates import CHANGED, LEAST_BYTES, Rates, Throughput
from offload.activations.recording import Recording
from offload.activations.ways import LINK, ways_to_tiers
from perfmodel.schedules.activations import ActivationSchedule, effort_for, plan_activations
from perfmodel.schedules.slowdown import slowed_to_fit
from perfmodel.schedules.stall import stall_s
from perfmodel.schedules.trace import Channel, Limits, Trace

__all__ = ["ScheduleBook"]

# How many kinds of forward (bucketed sequence lengths, say) are remembered.
_REMEMBERED = 64
# What a drive has shown is not what it does every time: a part of it stays in reserve.
_RELIED_ON = 0.8
_MOST_PATIENT = 64
# A way that became so much slower or faster is planned for again after a fraction of that.
_MUCH, _IMPATIENT = 1.0, 8
# A step that waits for more than this part of itself was not planned to. First steps are slow: what
# was recorded of them gives transfers more time than there is later.
_WAITS = 0.01
# A pause between two forwards, to validate say, shall not count.
_PERIODS = 9
# After so many backwards without a measurement a little goes out to have one.
_PROBED_AFTER = 16


@dataclass
class _Entry:
    order: list[int]
    trace: Trace | None = None
    key: BlockKey | None = None
    """Of the forward's blocks, where some are recomputed."""
    plan: Plan | None = None
    stale: bool = False
    over_bytes: int = 0
    """What the plan needs, where that is more than `memory_bytes`."""
    small_bytes: int = 0
    depth: int = 1
    recordings: int = 0
    unlike: int = 0
    """How many backwards in a row waited, though by the plan none does, or had another depth."""
    trust: int = 2
    """After so many of them the step is recorded anew."""
    uses: int = 0
    """Of the plan. Planning takes time: each plan is followed at least `patience` times."""
    patience: int = 1

    def is_held(self, number: int) -> bool:
        """Say whether somebody else was seen to keep a region in memory."""
        return self.trace is not None and self.trace.tensors[number].held


@dataclass
class ScheduleBook:
    """The plans of all kinds of forward of one instance. Its owner's lock guards it."""

    staging_bytes: int
    tier_bytes: Mapping[str, float]
    """What each tier may hold."""
    memory_bytes: int | None
    write_bytes_per_s: float
    """What the drive may be given without end, for the sake of its life."""
    follow: bool
    """False: everything large is offloaded, and only orders are remembered."""
    window_bytes: int | None = None
    """What copies may hold of a device's memory; None: as much as schedules need."""
    tolerated_slowdown: float = 0.0
    """How much longer a step may become for the sake of less memory, as a part of it."""
    stall_s: Callable[[], float] = lambda: 0.0
    """For how long training has waited for I/O."""
    _entries: OrderedDict[tuple[int, ...], _Entry] = field(default_factory=OrderedDict)
    blocks: BlockBook = field(init=False)
    rates: dict[str, Rates] = field(default_factory=dict)
    """Of the SSD, and of the link where there is one."""
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
    unmet_bytes: int = 0
    """What stays although `memory_bytes` is less, once that is certain."""
    unrepeatable: int = 0
    """How many blocks of a forward change what they use."""
    backward_inside: bool = False
    """A backward ran before its forward had ended, so that nothing could be learned from it."""
    several_devices: bool = False
    """A forward saved tensors of several devices, of which no schedule can be made."""
    _failure: str = ""
    _said: set[str] = field(default_factory=set)
    record_next: bool = False
    """The last forward turned out to be of no known kind when it was late to record it."""

    def __post_init__(self) -> None:
        """Open the book of blocks."""
        self.blocks = BlockBook(self.memory_bytes, self.tolerated_slowdown)

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
        waited: float = 0.0,
        small_bytes: int = 0,
    ) -> None:
        """Remember how a whole backward went, and the blocks of its forward.

        `order` is of its regions, `depth` how many forwards were under way with it, `waited` for
        which part of the time training waited for I/O; `small_bytes` were saved beside.
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
        if confirmed:
            self._check(entry, runs, depth, waited)
        unknown = runs is not None and runs.to_learn
        if recording is not None and recording.needed and (unknown or not confirmed):
            entry.small_bytes = small_bytes
            transients = self.blocks.transients(runs) if runs is not None else ()
            entry.trace, entry.depth, entry.stale = recording.trace(sizes, transients), depth, True
            entry.recordings += 1
            self.record_next = False
            if runs is not None and runs.recompute:
                entry.key = runs.key
            elif runs is not None and entry.recordings > 1:
                self.unrepeatable = sum(not noted.repeatable for noted in runs.noted)
                self.blocks.learn(runs, entry.trace, depth, recording, small_bytes)

    def _check(self, entry: _Entry, runs: BlockRuns | None, depth: int, waited: float) -> None:
        """Hold a plan that is in force against what it was to do."""
        if entry.over_bytes:
            self._missed(entry, runs)
        assert entry.plan is not None
        waits = not entry.plan.schedule.slowdown and waited > _WAITS
        entry.unlike = entry.unlike + 1 if waits or depth != entry.depth else 0
        if entry.unlike >= entry.trust:
            # The recorded step was not like the others: one that is has to be recorded.
            entry.plan = replace(entry.plan, confirmed=False)
            entry.unlike, entry.trust = 0, min(2 * entry.trust, _MOST_PATIENT)

    def _missed(self, entry: _Entry, runs: BlockRuns | None) -> None:
        """Have more blocks recomputed where the plan in force takes too much memory, or tell."""
        key = runs.key if runs is not None else None
        final = key is None or runs is None or self.blocks.settled(runs)
        if final and not (key is not None and self.blocks.missed(key, entry.over_bytes)):
            self.unmet_bytes = entry.over_bytes

    def recompute_of(self, key: BlockKey) -> frozenset[int]:
        """Return the numbers of the blocks that this kind of forward recomputes."""
        if self._known() is not None:
            begin_s = perf_counter()
            self.blocks.renew(key, self._machine)
            self.planning_s += perf_counter() - begin_s
        return self.blocks.recompute_of(key)

    def observe(self, **seen: tuple[tuple[float, float], ...]) -> None:
        """Take in what each way has done so far: bytes and busy seconds, as `Rates.observe`."""
        news = [
            self.rates.setdefault(name, Rates()).observe(*totals) for name, totals in seen.items()
        ]
        # A drive to which nothing goes is not seen to have become faster.
        self._unseen = 0 if all(news) else self._unseen + 1
        if self._unseen >= _PROBED_AFTER:
            self._unseen, self.probe_bytes = 0, LEAST_BYTES
        for entry in self._entries.values():
            # What is stale is planned again when its kind comes, maybe never.
            if entry.plan is None or entry.stale or entry.uses < entry.patience // _IMPATIENT:
                continue
            least = CHANGED if entry.uses >= entry.patience else _MUCH
            planned = entry.plan.rates
            if any(self.rates[name].throughput.differs(planned[name], least) for name in planned):
                entry.stale = True
                self.blocks.drive_changed()

    def idle_s(self) -> float:
        """Return for how long training has waited for I/O or for a plan."""
        return self.stall_s() + self.planning_s

    def begin(self, now_s: float) -> tuple[float, float]:
        """Take in that a forward begins at this time; return what `waited_since` takes."""
        self.forwards += 1
        if not math.isnan(self._begun_s):
            self._periods_s.append(now_s - self._begun_s)
        self._begun_s = now_s
        return now_s, self.stall_s()

    def waited_since(self, begun: tuple[float, float]) -> float:
        """Return for which part of the time since then training has waited for I/O."""
        begun_s, stalled_s = begun
        return (self.stall_s() - stalled_s) / max(1e-9, perf_counter() - begun_s)

    def _known(self) -> dict[str, Throughput] | None:
        """Return what all ways do, once that is known of each that is used."""
        known = {name: rates.throughput.known() for name, rates in self.rates.items()}
        found = {name: rate for name, rate in known.items() if rate is not None}
        ways = {"ssd"} & set(self.tier_bytes) | ({LINK} & set(known)) or {LINK}
        return found if self.follow and ways <= set(found) else None

    def _renew(self, sizes: tuple[int, ...], entry: _Entry) -> None:
        """Plan what was recorded, or planned for another drive than it has become."""
        if not entry.stale or entry.trace is None or self._known() is None:
            return
        begin_s = perf_counter()
        schedule = self._scheduled(entry, entry.trace)
        entry.plan = self._planned(sizes, entry, schedule)
        # Whoever was in force for long may be planned again sooner.
        lasted = entry.uses > 2 * entry.patience
        entry.patience = max(1, entry.patience // 2) if lasted else 2 * entry.patience
        entry.patience = min(entry.patience, _MOST_PATIENT)
        entry.stale, entry.uses = False, 0
        self.planning_s += perf_counter() - begin_s

    def _machine(self, depth: int, relied_on: float = _RELIED_ON) -> tuple[list[Channel], Limits]:
        """Return what each of `depth` forwards that are under way together may use."""
        known = self._known()
        assert known is not None
        share = relied_on / depth
        channels = []
        for tier, (write, read, mixed) in ways_to_tiers(known, self.tier_bytes).items():
            channels.append(
                Channel(
                    tier=tier,
                    write_bytes_per_s=write * share,
                    read_bytes_per_s=read * share,
                    mixed_bytes_per_s=mixed * share,
                    capacity_bytes=self.tier_bytes[tier] / depth,
                    written_bytes=self._written_bytes() if tier == "ssd" else math.inf,
                    staged=tier == "ssd",  # what goes no farther than the host is not
                )
            )
        bounded = LINK in known and self.window_bytes is not None
        window_bytes = float(self.window_bytes or 0) / depth if bounded else math.inf
        return channels, Limits(staging_bytes=self.staging_bytes / depth, window_bytes=window_bytes)

    def _written_bytes(self) -> float:
        """Return what one forward may write."""
        if self.write_bytes_per_s == math.inf or not self._periods_s:
            return math.inf
        return self.write_bytes_per_s * median(self._periods_s)

    def _scheduled(self, entry: _Entry, trace: Trace) -> ActivationSchedule:
        """Plan for what the step may take longer, and for more where that does not fit."""
        channels, limits = self._machine(entry.depth)
        memory_bytes, slowdown = self.memory_bytes, self.blocks.slowdown_of(entry.key)
        small_bytes = entry.small_bytes
        left = max(0, memory_bytes - small_bytes) if memory_bytes is not None else None
        effort = effort_for(trace)
        schedule = plan_activations(trace, channels, limits, left, slowdown=slowdown, effort=effort)
        if memory_bytes is None or left is None:
            return schedule
        if entry.key is not None:  # more blocks can be recomputed from the next forward on, maybe
            self.blocks.missed(entry.key, schedule.peak_bytes + small_bytes)
        schedule = slowed_to_fit(schedule, trace, channels, limits, left, effort)
        needed_bytes = schedule.peak_bytes + small_bytes
        entry.over_bytes = needed_bytes if needed_bytes > memory_bytes else 0
        return schedule

    def _waits(self, entry: _Entry, schedule: ActivationSchedule) -> float:
        """Return for which part of a step it is expected to wait, at all that the ways have done.

        A part of the time without waiting.
        """
        assert entry.trace is not None
        step_s = max((tensor.released_s for tensor in entry.trace.tensors), default=0.0)
        channels, limits = self._machine(entry.depth, relied_on=1.0)
        memory_bytes = math.inf
        if self.memory_bytes is not None:
            memory_bytes = max(schedule.peak_bytes, self.memory_bytes - entry.small_bytes)
        waited_s = stall_s(schedule, entry.trace, channels, limits, memory_bytes)
        return waited_s / step_s if step_s else 0.0

    def failed(self, error: Exception) -> None:
        """Take in that a step could not be learned from; it is told by `say_what_is_wrong`."""
        self._failure = f"{type(error).__name__}: {error}"

    def say_what_is_wrong(self) -> None:
        """Warn once of each thing that users should know. Without the owner's lock."""
        if self.unmet_bytes:
            self._say(
                f"memory_bytes={self.memory_bytes} cannot be met: at one moment {self.unmet_bytes} "
                "bytes of saved tensors are in use, on their way, held by others, or smaller than "
                "min_tensor_bytes; give more, or have smaller layers recomputed by act.block()"
            )
        if self.unrepeatable and (self.memory_bytes is not None or self.tolerated_slowdown):
            self._say(
                f"blocks of a forward ({self.unrepeatable} of them) change their arguments or "
                "buffers of their modules (running statistics, say), or draw from a random "
                "generator that is not PyTorch's default one: they are never recomputed"
            )
        if self.backward_inside and self.follow:
            self._say(
                "a backward ran inside of its `with act.forward():`, where nothing is planned and "
                "memory_bytes does not hold; call backward() behind it"
            )
        if self.several_devices and self.follow:
            self._say(
                "a forward saved large tensors of several devices, or of the host beside a "
                "device's: it has no schedule, and memory_bytes does not hold for it"
            )
        if self._failure:
            self._say(f"a step could not be recorded ({self._failure}); it has no schedule")

    def _say(self, what: str) -> None:
        kind = what.split(maxsplit=1)[0] + what.split()[1]
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(what, RuntimeWarning, stacklevel=4)

    def _planned(self, sizes: tuple[int, ...], entry: _Entry, schedule: ActivationSchedule) -> Plan:
        known = self._known()
        assert known is not None
        self.planned += 1
        count = len(sizes)
        order = [number for number in schedule.order if number < count]
        place = {number: at for at, number in enumerate(order)}
        begun = [
            max((place[number] for number in some), default=-1)
            for some in (schedule.reads_first, *schedule.reads_before)
        ]
        due = zip(schedule.order, list(accumulate(begun, max))[1:], strict=True)
        return Plan(
            sizes=sizes,
            tiers=schedule.tiers[:count],
            order=tuple(order),
            due=tuple(last for number, last in due if number < count),
            due_first=begun[0],
            depth=entry.depth,
            schedule=schedule,
            rates=known,
            confirmed=entry.recordings > 1,
            small_bytes=entry.small_bytes,
            slowdown=self._waits(entry, schedule),
            held=frozenset(number for number in range(count) if entry.is_held(number)),
        )
