"""Which blocks of a model are computed again in the backward instead of being saved.

A block that is recomputed saves only what enters it. Its other tensors come into being when its
backward begins, and everything after that is later by the time of its forward.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from perfmodel.schedules.activations import plan_activations
from perfmodel.schedules.trace import Channel, Limits, SavedTensor, Trace

__all__ = [
    "Block",
    "BlockChoice",
    "cheapest_blocks",
    "choose_blocks",
    "freed_by",
    "frees_anything",
    "leanest_blocks",
    "recomputed",
]

# How many choices are tried while the last of too many blocks are taken out again.
_PRUNINGS = 8


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the forward that can be repeated, and what it saved.

    Raises ValueError for a negative duration.
    """

    duration_s: float
    """Of its forward."""
    saved: range
    """The tensors of the trace that it saved."""
    enters: tuple[int, ...] = ()
    """Those that repeating it needs: they are saved either way."""
    small_bytes: int = 0
    """What it saved beside, too small to stand in a trace: gone where it is recomputed."""

    def __post_init__(self) -> None:
        """Check the duration."""
        if not self.duration_s >= 0:
            raise ValueError(f"a block cannot take {self.duration_s} s")


@dataclass(frozen=True)
class BlockChoice:
    """Which blocks are recomputed, and what is expected of it."""

    recompute: frozenset[int]
    extra_s: float
    """What recomputing adds to the step."""
    peak_bytes: int
    slowdown: float = 0.0
    """What the step that is longer by `extra_s` may still wait, as a part of it."""


def freed_by(blocks: Sequence[Block], number: int) -> list[int]:
    """Return the tensors that block `number` need not save: no block needs them to be repeated."""
    return _freed(blocks[number], _needed(blocks))


def _needed(blocks: Sequence[Block]) -> frozenset[int]:
    """Return what some block needs to be repeated."""
    return frozenset(index for block in blocks for index in block.enters)


def _freed(block: Block, needed: Collection[int]) -> list[int]:
    return [index for index in block.saved if index not in needed]


def frees_anything(blocks: Sequence[Block]) -> list[int]:
    """Return the numbers of the blocks that save less where they are recomputed."""
    needed = _needed(blocks)
    return [
        number for number, block in enumerate(blocks) if block.small_bytes or _freed(block, needed)
    ]


def recomputed(trace: Trace, blocks: Sequence[Block], chosen: Collection[int]) -> Trace:
    """Return the trace of the same step with the blocks `chosen` recomputed."""
    tensors = trace.tensors
    repeats = []
    inside: dict[int, int] = {}
    needed = _needed(blocks)
    for number in chosen:
        freed = _freed(blocks[number], needed)
        if freed:
            inside.update(dict.fromkeys(freed, number))
            begin_s = min(tensors[index].needed_s for index in freed)
            repeats.append((begin_s, blocks[number].duration_s, number))
    repeats.sort()
    starts = [begin_s for begin_s, _, _ in repeats]
    delays = [0.0, *accumulate(duration_s for _, duration_s, _ in repeats)]
    begun_s = {
        number: begin_s + delays[place] for place, (begin_s, _, number) in enumerate(repeats)
    }

    wanted_s: dict[int, float] = {}
    for number, time_s in begun_s.items():
        for index in blocks[number].enters:
            wanted_s[index] = min(wanted_s.get(index, time_s), time_s)

    def later(time_s: float) -> float:
        return time_s + delays[bisect_right(starts, time_s)]

    moved = []
    for index, tensor in enumerate(tensors):
        released_s, needed_s = later(tensor.released_s), later(tensor.needed_s)
        if index in inside:
            # All at once: when exactly each comes into being again is not worth a trace.
            saved_s = begun_s[inside[index]]
            whole = tensor.nbytes + tensor.rest_bytes
            moved.append(SavedTensor(whole, saved_s, needed_s, released_s, held=True))
            continue
        needed_s = max(tensor.saved_s, min(needed_s, wanted_s.get(index, needed_s)))
        moved.append(replace(tensor, needed_s=needed_s, released_s=max(needed_s, released_s)))
    return Trace(tuple(sorted(moved, key=lambda tensor: tensor.saved_s)))


def cheapest_blocks(
    trace: Trace,
    blocks: Sequence[Block],
    channels: Sequence[Channel],
    limits: Limits,
    memory_bytes: int,
    slowdown: float = 0.0,
    small_bytes: int = 0,
    effort: float = 1.0,
) -> BlockChoice:
    """Return `choose_blocks`, or no block at all where waiting for transfers takes less time.

    `extra_s` of the latter is how long the step waits at most. `effort`: as for `plan_activations`,
    of the plan that recomputes nothing.
    """
    left = max(0, memory_bytes - small_bytes)
    plan = plan_activations(trace, channels, limits, left, slowdown=slowdown, effort=effort)
    if plan.peak_bytes + small_bytes <= memory_bytes:
        return BlockChoice(frozenset(), 0.0, plan.peak_bytes + small_bytes)
    chosen = choose_blocks(trace, blocks, channels, limits, memory_bytes, slowdown, small_bytes)
    if not chosen.recompute:
        return chosen
    # Is there a step that waits no longer than that and fits as well?
    step_s = max(tensor.released_s for tensor in trace.tensors)
    slower = slowdown + chosen.extra_s / step_s if step_s else math.inf
    if not slower < math.inf:
        return chosen
    target = max(0, max(memory_bytes, chosen.peak_bytes) - small_bytes)
    waiting = plan_activations(trace, channels, limits, target, slowdown=slower, effort=0.0)
    if waiting.peak_bytes > target:
        return chosen
    return BlockChoice(frozenset(), chosen.extra_s, waiting.peak_bytes + small_bytes)


def choose_blocks(
    trace: Trace,
    blocks: Sequence[Block],
    channels: Sequence[Channel],
    limits: Limits,
    memory_bytes: int,
    slowdown: float = 0.0,
    small_bytes: int = 0,
) -> BlockChoice:
    """Choose the blocks that take the least time and let the peak fit into `memory_bytes`.

    What is not recomputed may leave by `channels`, in a step that may wait for `slowdown` of its
    time; `small_bytes` of the forward, those of blocks included, can only be recomputed. Where
    nothing fits: the least peak found.
    """
    trials = _Trials(trace, blocks, channels, limits, memory_bytes, slowdown, small_bytes)
    best = trials.of(())
    worthwhile = frees_anything(blocks)
    if best.peak_bytes <= memory_bytes or not worthwhile:
        return best
    for order in _orders(trace, blocks, worthwhile):
        best = trials.better(best, trials.fewest_of(order))
    if best.peak_bytes > memory_bytes:  # more blocks are not always less memory
        for number in worthwhile[-_PRUNINGS:]:
            best = trials.better(best, trials.of((number,)))
    for number in sorted(best.recompute, key=lambda number: -blocks[number].duration_s)[:_PRUNINGS]:
        best = trials.better(best, trials.of(best.recompute - {number}))
    return best


def leanest_blocks(
    trace: Trace,
    blocks: Sequence[Block],
    channels: Sequence[Channel],
    limits: Limits,
    slowdown: float,
    small_bytes: int = 0,
) -> BlockChoice:
    """Choose the blocks with which the peak is least in a step that takes `slowdown` of it longer.

    That time goes to recomputing, and what is left of it to waiting for transfers.
    """
    step_s = max((tensor.released_s for tensor in trace.tensors), default=0.0)
    allowed_s = slowdown * step_s

    def outcome(chosen: Sequence[int], extra_s: float) -> BlockChoice:
        left = max(0.0, allowed_s - extra_s) / (step_s + extra_s) if step_s else 0.0
        trials = _Trials(trace, blocks, channels, limits, 0, left, small_bytes)
        return replace(trials.of(chosen), slowdown=left)

    best = outcome((), 0.0)
    worthwhile = frees_anything(blocks)
    for order in _orders(trace, blocks, worthwhile):
        spent = [0.0, *accumulate(blocks[number].duration_s for number in order)]
        most = bisect_right(spent, allowed_s) - 1
        for count in sorted({most, most // 2, most // 4} - {0}):
            other = outcome(order[:count], spent[count])
            best = min(best, other, key=lambda it: (it.peak_bytes, it.extra_s))
    return best


class _Trials:
    """What comes of recomputing some blocks, and which outcome is the better one."""

    def __init__(
        self,
        trace: Trace,
        blocks: Sequence[Block],
        channels: Sequence[Channel],
        limits: Limits,
        memory_bytes: int,
        slowdown: float,
        small_bytes: int,
    ) -> None:
        self._trace, self._blocks = trace, blocks
        self._channels, self._limits = channels, limits
        self._memory_bytes, self._slowdown = memory_bytes, slowdown
        self._small_bytes = small_bytes
        self._tried: dict[frozenset[int], BlockChoice] = {}

    def of(self, chosen: Collection[int]) -> BlockChoice:
        """Recompute `chosen`."""
        key = frozenset(chosen)
        if key not in self._tried:
            self._tried[key] = self._outcome(key)
        return self._tried[key]

    def _outcome(self, chosen: frozenset[int]) -> BlockChoice:
        again = [self._blocks[number].small_bytes for number in chosen]
        # Those of a block that is recomputed come into being for as long as its backward runs.
        small_bytes = max(0, self._small_bytes - sum(again)) + max(again, default=0)
        schedule = plan_activations(
            recomputed(self._trace, self._blocks, chosen),
            self._channels,
            self._limits,
            max(0, self._memory_bytes - small_bytes),
            slowdown=self._slowdown,
            effort=0.0,
        )
        extra_s = sum(self._blocks[number].duration_s for number in chosen)
        return BlockChoice(chosen, extra_s, schedule.peak_bytes + small_bytes)

    def better(self, one: BlockChoice, other: BlockChoice) -> BlockChoice:
        """Return the one that fits in less time, or comes closer to fitting."""
        return min(one, other, key=lambda it: (max(it.peak_bytes, self._memory_bytes), it.extra_s))

    def fewest_of(self, order: Sequence[int]) -> BlockChoice:
        """Return the best of some beginnings of `order`, the shortest that fits if more fit."""
        best = self.of(order)
        low, high = 0, len(order)
        while low < high:  # most often more blocks are less memory
            middle = (low + high) // 2
            choice = self.of(order[:middle])
            best = self.better(best, choice)
            if choice.peak_bytes <= self._memory_bytes:
                high = middle
            else:
                low = middle + 1
        return best


def _orders(
    trace: Trace, blocks: Sequence[Block], worthwhile: Sequence[int]
) -> Iterator[list[int]]:
    """Yield orders to take blocks in: cheapest first, last first, first first, evenly spread."""

    needed = _needed(blocks)

    def seconds_a_byte(number: int) -> float:
        block = blocks[number]
        freed = sum(trace.tensors[index].nbytes for index in _freed(block, needed))
        return block.duration_s / (freed + block.small_bytes)

    yield sorted(worthwhile, key=seconds_a_byte)
    yield list(reversed(worthwhile))
    yield list(worthwhile)
    count = len(worthwhile)
    # Of each halving the middle: 1/2, 1/4, 3/4, 1/8, ...
    spread = sorted(range(count), key=lambda place: _bits_reversed(place, count.bit_length()))
    yield [worthwhile[place] for place in spread]


def _bits_reversed(value: int, width: int) -> int:
    return int(format(value, f"0{width}b")[::-1], 2)
