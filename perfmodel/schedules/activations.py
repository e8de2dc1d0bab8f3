"""Which saved tensors leave, where to, and when each is read back.

Two aims: the least peak memory in a step that may become so much longer (not at all, say), or the
fewest bytes moved within a memory limit.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from perfmodel.schedules.nested import Nested
from perfmodel.schedules.prefix_cut import prefix_cut
from perfmodel.schedules.replay import KEPT, Outcome, Replay
from perfmodel.schedules.trace import Channel, Limits, Trace

__all__ = ["ActivationSchedule", "effort_for", "plan_activations", "quick_peak"]

# How much work the search may do: choices tried times tensors in each.
_SEARCH_TENSORS = 150_000
# A step of so many seconds is worth all of that work, which takes about a fifth of it.
_WORTH_ALL_S = 2.0
# So few choices are all tried.
_FEW_CHOICES = 1024
# Beginnings at random, besides the ones that are thought to be good.
_RESTARTS = 48
# With more tensors than this only a few beginnings are tried, and repaired in bulk.
_MANY = 2048


@dataclass(frozen=True)
class ActivationSchedule:
    """What to do with each tensor of a trace, in the order of saving, and what comes of it."""

    tiers: tuple[str, ...]
    """`device` for those that are kept."""
    read_s: tuple[float, ...]
    """When each read begins at the latest, on the trace's clock; infinite for those kept."""
    order: tuple[int, ...]
    """Of the tensors, as the backward wants them."""
    reads_first: tuple[int, ...]
    """The tensors whose reads begin before the backward asks for anything."""
    reads_before: tuple[tuple[int, ...], ...]
    """For each place in `order`: those whose reads begin when it is asked for, since they must
    before the next one is."""
    peak_bytes: int
    staging_peak_bytes: int
    window_bytes: int
    """The most of the device that is on its way out, or back before it is wanted."""
    moved_bytes: int
    slowdown: float = 0.0
    """How much longer the step may become by waiting, as a part of it. `read_s` does not say so: a
    step of 1 s that becomes 1.1 s long is on that clock still one of 1 s."""


def plan_activations(
    trace: Trace,
    channels: Sequence[Channel],
    limits: Limits | None = None,
    memory_bytes: int | None = None,
    *,
    slowdown: float = 0.0,
    effort: float = 1.0,
) -> ActivationSchedule:
    """Choose a tier for every tensor of `trace`.

    No write may hold up the forward, no read the backward, in a step that takes `slowdown` of
    itself longer. Without `memory_bytes`: the least peak that is possible so. With it: the fewest
    bytes moved with a peak within `memory_bytes`; where that is out of reach, the least peak. The
    result is the same for the same arguments, however fast the machine. `effort`: how
    much of the search is made, from 1 down to 0: a good choice, and none for a better one.

    Raises ValueError for a negative slowdown, or an effort that is none.
    """
    if not 0 <= effort <= 1:
        raise ValueError(f"effort={effort!r} is not a part of the search: 0 to 1")
    if not 0 <= slowdown < math.inf:
        raise ValueError(f"slowdown={slowdown!r} is not a part of a step: 0, or 0.05 say")
    search = _search(trace, channels, limits or Limits(), memory_bytes or 0, slowdown, effort)
    choice, outcome = search.without_window() or search.best()
    schedule = _schedule_of(search.replay, search.replay.tied(choice), outcome)
    return replace(schedule, slowdown=slowdown)


def quick_peak(
    trace: Trace, channels: Sequence[Channel], limits: Limits, memory_bytes: int, slowdown: float
) -> int:
    """Return the peak of what `plan_activations` finds without effort."""
    search = _search(trace, channels, limits, memory_bytes, slowdown, 0.0)
    return (search.without_window() or search.best())[1].peak_bytes


def _search(
    trace: Trace, channels: Sequence[Channel], limits: Limits, target: int, *rest: float
) -> _Search:
    slowdown, effort = rest
    # A step that waits, evenly spread, is to its transfers what faster channels are.
    channels = [_faster(channel, 1 + slowdown) for channel in channels]
    return _Search(Replay(trace, channels, limits), target, effort)


def effort_for(trace: Trace) -> float:
    """Return how much of the search a trace is worth: a short step is soon better taken."""
    duration_s = max((tensor.released_s for tensor in trace.tensors), default=0.0)
    return min(1.0, duration_s / _WORTH_ALL_S)


def _faster(channel: Channel, factor: float) -> Channel:
    if factor == 1:
        return channel
    return replace(
        channel,
        write_bytes_per_s=channel.write_bytes_per_s * factor,
        read_bytes_per_s=channel.read_bytes_per_s * factor,
        mixed_bytes_per_s=channel.mixed_bytes_per_s * factor,
        latency_s=channel.latency_s / factor,
    )


_Found = tuple[list[int], Outcome]


class _Search:
    """Tries choices on a replay; peaks below `target` are as good as `target`."""

    def __init__(self, replay: Replay, target: int, effort: float) -> None:
        self.replay = replay
        self.target = target
        self._effort = effort
        self._trials = int(_SEARCH_TENSORS * effort) // max(1, len(replay.nbytes))
        self._tries = 0
        self.movable = [index for index, yes in enumerate(replay.movable) if yes]

    def without_window(self) -> _Found | None:
        """Return what is best without the window, if its copies fit: a wide one costs nothing."""
        replay = self.replay
        if replay.limits.window_bytes == math.inf:
            return None
        limits = replace(replay.limits, window_bytes=math.inf)
        free = _Search(Replay(replay.trace, replay.channels, limits), self.target, self._effort)
        # Of very many, a first choice that does not fit is not worth looking for a better one.
        if len(self.movable) > _MANY and not replay.fits_window(*free.first()):
            return None
        found = free.best()
        return found if replay.fits_window(*found) else None

    def key(self, outcome: Outcome) -> tuple[int, float]:
        # Of equal peaks, the emptier memory is closer to a lower peak.
        return max(outcome.peak_bytes, self.target), outcome.byte_seconds

    def first(self) -> _Found:
        """Return the best of the beginnings, or the first that meets the target."""
        found = self._nothing()
        for start in self._beginnings() if self.replay.channels and self.movable else ():
            if found[1].peak_bytes <= self.target:
                break
            found = self._better(found, start)
        return found

    def _nothing(self) -> _Found:
        kept = [KEPT] * len(self.replay.nbytes)
        return kept, self.replay.run(kept)

    def best(self) -> _Found:
        """Return the best choice found."""
        if not self._effort:
            return self.first()
        replay = self.replay
        nothing = self._nothing()
        if not replay.channels or not self.movable or nothing[1].peak_bytes <= self.target:
            return nothing
        options = range(KEPT, len(replay.channels))
        if len(options) ** len(self.movable) <= _FEW_CHOICES:
            return self._best_of_all(nothing, options)
        # Of very many, the few that could be moved one by one would find nothing.
        many = len(self.movable) > _MANY
        self._tries = 0 if many else self._trials
        found = self._improve(*self.first(), pairs=True)
        rng = random.Random(0)  # the same plan for the same trace
        for restart in range(_RESTARTS):
            if self._tries <= 0 or found[1].peak_bytes <= self.target:
                break
            some = rng.sample(self.movable, rng.randint(0, len(self.movable)))
            choice = self._accept(some)
            if restart % 2:  # what came second may leave all the same
                for index in some:
                    choice[index] = max(choice[index], 0)
            start = self._feasible(some, choice)
            found = self._better(found, self._improve(*start, pairs=False))
        found = self._improve(*found, pairs=True)
        return self._pruned(*found)

    def _best_of_all(self, found: _Found, options: Iterable[int]) -> _Found:
        for chosen in product(options, repeat=len(self.movable)):
            choice = [KEPT] * len(found[0])
            for index, option in zip(self.movable, chosen, strict=True):
                choice[index] = option
            outcome = self.replay.run(choice)
            if outcome.broken < 0:
                found = self._better(found, (choice, outcome))
        return self._pruned(*found)

    def _beginnings(self) -> Iterator[_Found]:
        """Yield choices to improve on: what leaves first, stays away longest, or frees the most."""
        replay = self.replay
        away_s = list(map(operator.sub, replay.needed_s, replay.saved_s))
        orders: list[Callable[[int], float]] = [
            lambda index: index,
            lambda index: -away_s[index],
            lambda index: -away_s[index] * replay.nbytes[index],
        ]
        for order in orders[: 1 if len(self.movable) > _MANY else None]:
            ranked = sorted(self.movable, key=order)
            yield self._feasible(ranked, self._accept(ranked))
        cut = prefix_cut(replay.trace, replay.channels[0])
        outcome = replay.run(cut)
        if outcome.broken < 0:
            yield cut, outcome
        elif len(self.movable) <= _MANY:
            yield self._feasible(self.movable, cut)

    def _better(self, one: _Found, other: _Found) -> _Found:
        return min(one, other, key=lambda found: self.key(found[1]))

    def _accept(self, order: Iterable[int]) -> list[int]:
        """Take tensors in `order` while a channel can still write and read them in time.

        Exact where lifetimes are nested and the longest come first; else only a beginning.
        """
        replay, limits = self.replay, self.replay.limits
        choice = [KEPT] * len(replay.nbytes)
        free_s = [0.0] * len(replay.channels)
        begin_s = [math.inf] * len(replay.channels)
        staging = Nested(limits.staging_bytes)
        window = Nested(limits.window_bytes, alone=True)
        bounded = min(limits.staging_bytes, limits.window_bytes) < math.inf
        ways = [(number, *replay.seconds(number, False)) for number in range(len(replay.channels))]
        # Most of a search is this loop.
        for index in order:
            saved_s, needed_s = replay.saved_s[index], replay.needed_s[index]
            best = (math.inf, 0, 0.0, 0.0)
            for number, write_s, fetch_s in ways:
                written_s, read_s = free_s[number], begin_s[number]
                written_s = (written_s if written_s > saved_s else saved_s) + write_s[index]
                read_s = (read_s if read_s < needed_s else needed_s) - fetch_s[index]
                option = written_s - read_s, number, written_s, read_s
                best = option if option < best else best
            margin_s, number, written_s, read_s = best
            if margin_s > 0:
                continue
            if bounded:
                nbytes, away = replay.nbytes[index], (saved_s, written_s)
                rooms = [(window, (read_s, needed_s))]
                if replay.channels[number].staged:
                    rooms.append((staging, (read_s, replay.released_s[index])))
                if not all(room.fits(nbytes, away, back) for room, back in rooms):
                    continue
                for room, back in rooms:
                    room.add(nbytes, away, back)
            choice[index], free_s[number], begin_s[number] = number, written_s, read_s
        return choice

    def _feasible(self, order: Sequence[int], choice: list[int]) -> _Found:
        """Keep what cannot leave as chosen until the rest can; of very many, all from there on."""
        replay = self.replay
        outcome = replay.run(choice)
        for _ in range(min(_MANY, _SEARCH_TENSORS // len(choice))):
            if outcome.broken < 0:
                return choice, outcome
            choice[outcome.broken] = KEPT
            outcome = replay.run(choice)
        found = [KEPT] * len(choice), replay.run([KEPT] * len(choice))
        ranked = [index for index in order if choice[index] != KEPT]
        low, high = 0, len(ranked)
        while low < high:
            middle = (low + high + 1) // 2
            tried = [KEPT] * len(choice)
            for index in ranked[:middle]:
                tried[index] = choice[index]
            outcome = replay.run(tried)
            if outcome.broken < 0:
                low, found = middle, (tried, outcome)
            else:
                high = middle - 1
        return found

    def _pruned(self, choice: list[int], outcome: Outcome) -> _Found:
        """Keep what buys nothing: first those that are away for the shortest time."""
        replay = self.replay
        peak = max(outcome.peak_bytes, self.target)
        moved = [index for index in self.movable if choice[index] != KEPT]
        moved.sort(key=lambda index: replay.needed_s[index] - replay.saved_s[index])
        found = choice, outcome
        step, tries = len(moved), self._trials
        while step and moved and tries > 0:
            at, before = 0, len(moved)
            while at < len(moved) and tries > 0:
                tries -= 1
                some = moved[at : at + step]
                tried = list(found[0])
                for index in some:
                    tried[index] = KEPT
                outcome = replay.run(tried)
                if outcome.broken < 0 and outcome.peak_bytes <= peak:
                    found = tried, outcome
                    del moved[at : at + step]
                else:
                    at += step
            # What could not stay before may now that others do.
            step = step // 2 or int(len(moved) < before)
        return found

    def _improve(self, choice: list[int], outcome: Outcome, *, pairs: bool) -> _Found:
        """Move single tensors, then maybe pairs, as long as that helps and tries are left."""
        options = [KEPT, *range(len(self.replay.channels))]
        improved = True
        while improved and self._tries > 0:
            improved = False
            for change in self._changes(choice, options, pairs):
                before = [(index, choice[index]) for index, _ in change]
                for index, option in change:
                    choice[index] = option
                tried = self.replay.run(choice)
                self._tries -= 1
                if tried.broken < 0 and self.key(tried) < self.key(outcome):
                    outcome, improved = tried, True
                else:
                    for index, option in before:
                        choice[index] = option
                if self._tries <= 0:
                    break
        return choice, outcome

    def _changes(
        self, choice: Sequence[int], options: Sequence[int], pairs: bool
    ) -> Iterable[tuple[tuple[int, int], ...]]:
        for index in self.movable:
            for option in options:
                if option != choice[index]:
                    yield ((index, option),)
        for one, other in combinations(self.movable, 2) if pairs else ():
            for first in options:
                for second in options:
                    if first != choice[one] and second != choice[other]:
                        yield ((one, first), (other, second))


def _schedule_of(replay: Replay, choice: Sequence[int], outcome: Outcome) -> ActivationSchedule:
    names = [channel.tier for channel in replay.channels]
    order = sorted(range(len(choice)), key=lambda index: replay.needed_s[index])
    reads = sorted(
        (index for index in order if choice[index] != KEPT), key=outcome.read_s.__getitem__
    )
    begun: list[tuple[int, ...]] = []
    at = 0
    for next_s in (*(replay.needed_s[index] for index in order), math.inf):
        due = at
        while due < len(reads) and outcome.read_s[reads[due]] < next_s:
            due += 1
        begun.append(tuple(reads[at:due]))
        at = due
    moved = [index for index, option in enumerate(choice) if option != KEPT]
    _, window_bytes = replay.window(moved, outcome.written_s, outcome.read_s)
    return ActivationSchedule(
        tiers=tuple("device" if option == KEPT else names[option] for option in choice),
        read_s=tuple(outcome.read_s),
        order=tuple(order),
        reads_first=begun[0],
        reads_before=tuple(begun[1:]),
        peak_bytes=outcome.peak_bytes,
        staging_peak_bytes=outcome.staging_peak_bytes,
        window_bytes=window_bytes,
        moved_bytes=outcome.moved_bytes,
    )
