"""The blocks of a forward, its layers say: what each saved, and which are computed again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from offload.activations.recording import Recording
from offload.activations.repeatable import Mark, Marks, Used, reached_by
from offload.device import can_offload
from perfmodel.schedules.activations import effort_for
from perfmodel.schedules.blocks import (
    Block,
    cheapest_blocks,
    freed_by,
    frees_anything,
    leanest_blocks,
)
from perfmodel.schedules.trace import Channel, Limits, Trace

if TYPE_CHECKING:
    from offload.activations.forward import ForwardPass

__all__ = ["BlockBook", "BlockKey", "BlockRuns", "Running"]

BlockKey = tuple[tuple[int, ...], tuple[tuple[int, ...], ...], Mark]
"""The sizes of what was saved before the first block, the shapes of what enters it, its mark."""

# How many kinds of forward are remembered.
_REMEMBERED = 64
# How often a choice that turned out to take too much memory is made again, more strictly.
_MOST_MISSES = 8
# How often a kind of forward may turn out to have other blocks, before none of it is recomputed.
_MOST_OTHERS = 4


class Running(threading.local):
    """Which forward a thread is in; nested ones are the innermost."""

    forward: ForwardPass | None = None
    in_block = False

    def current(self) -> ForwardPass | None:
        """Return that forward; one that a signal's handler threw its thread out of is left."""
        forward = self.forward
        while forward is not None and not forward.active:
            forward = forward.outer
        return forward

    def alone(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function`; blocks inside of it are plain calls, now and when it is repeated."""
        outer, self.in_block = self.in_block, True
        try:
            return function(*args)
        finally:
            self.in_block = outer


class Noted(NamedTuple):
    """What a block saved, and the recording's marks around its forward."""

    begin: Any
    end: Any
    saved: range
    enters: tuple[int, ...]
    repeatable: bool
    small_bytes: int
    mark: Mark


class BlockRuns:
    """Runs the blocks of one forward, and notes what each saved and how long it took."""

    def __init__(self) -> None:
        self.key: BlockKey | None = None
        """Of this kind of forward; None before the first block."""
        self.recompute: frozenset[int] = frozenset()
        self.to_learn = False
        """Nothing is known of this kind of forward, so it has to be recorded."""
        self.noted: list[Noted] = []
        self.used: Used | None = None
        """By the block that is running, where somebody asks."""

    def run(self, forward: ForwardPass, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Return `function(*args)`, of which the schedule may have only `args` saved.

        Raises RuntimeError for a block that is to be recomputed and changes what it uses.
        """
        leaves = tree_leaves(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        mark = self._mark(forward, function, leaves, tensors)
        again = len(self.noted) in self.recompute
        alone = forward.owner.running.alone
        recording, first = forward.recording, len(forward.regions)
        small_bytes = forward.small_bytes
        begin = recording.mark() if recording is not None else None
        used = None
        if again or recording is not None:
            used = self.used = Used(tensors, reached_by(function, leaves), learning=not again)
            again = again and not used.unrepeatable
        try:
            if again and used is not None:
                forward.owner.counters.recomputed_blocks += 1
                out = run_twice(alone, used, function, args)
            else:
                out = alone(function, *args)
        finally:
            self.used = None
        repeatable = used is None or used.ended(tree_leaves(out))
        if again and not repeatable:
            raise RuntimeError(
                f"block {len(self.noted)} of a forward changes its arguments, buffers of its "
                "modules or a random generator of its own, which it did not do before: it is not "
                "to be recomputed. Run it without act.block()"
            )
        if recording is not forward.recording:
            # The first tensor told on which device to look at the clock.
            recording = forward.recording
            begin = recording.begun if recording is not None else None
        end = recording.mark() if recording is not None else None
        saved, enters = range(first, len(forward.regions)), forward.regions_of(tensors)
        small_bytes = forward.small_bytes - small_bytes
        self.noted.append(Noted(begin, end, saved, enters, repeatable, small_bytes, mark))
        return out

    def _mark(
        self,
        forward: ForwardPass,
        function: Callable[..., Any],
        leaves: Sequence[object],
        tensors: Sequence[torch.Tensor],
    ) -> Mark:
        """Return the block's mark; recompute no more where it is another one than was chosen."""
        book = forward.owner.book
        movable = [tensor for tensor in tensors if not self.noted and can_offload(tensor)]
        if movable:  # a mask may be on the host, whatever the device
            with forward.owner.lock:
                forward.meet(min(movable, key=lambda tensor: tensor.is_cpu))
        if not book.blocks.wanted:
            return ()
        with forward.owner.lock:
            mark = book.blocks.marks.of(function, leaves)
            if self.key is None:
                sizes = tuple(region.nbytes for region in forward.regions)
                self.key = sizes, tuple(tuple(tensor.shape) for tensor in tensors), mark
                self.recompute = book.recompute_of(self.key)
                self.to_learn = book.blocks.unknown(self.key)
                if self.to_learn and forward.recording is None:  # too late for this one
                    book.record_next = True
            number = len(self.noted)
            if self.recompute and not book.blocks.is_like(self.key, number, mark):
                self.recompute = frozenset(other for other in self.recompute if other < number)
        return mark

    def blocks(self, recording: Recording) -> tuple[Block, ...]:
        """Return the blocks of a forward that was recorded; what none may repeat saves nothing."""
        blocks = []
        for noted in self.noted:
            duration_s = recording.duration_s(noted.begin, noted.end)
            # A checkpoint gives each tensor once.
            if noted.repeatable and recording.asked_again.isdisjoint(noted.saved):
                blocks.append(Block(duration_s, noted.saved, noted.enters, noted.small_bytes))
            else:
                blocks.append(Block(duration_s, range(0), noted.enters))
        return tuple(blocks)


def run_twice(
    alone: Callable[..., Any],
    used: Used,
    function: Callable[..., Any],
    args: Sequence[Any],
) -> Any:
    """Return `function(*args)`, which runs once more in the backward.

    That raises RuntimeError where what it uses besides `args` was changed meanwhile.
    """
    leaves, spec = tree_flatten(tuple(args))  # its inputs leave one by one, whatever they came in
    ran = False

    def run(*inputs: Any) -> Any:
        nonlocal ran
        call = partial(alone, function, *tree_unflatten(inputs, spec))
        if ran:
            return used.run_again(call)
        ran = True
        return call()

    return checkpoint(run, *leaves, use_reentrant=False)


@dataclass
class _Choice:
    trace: Trace
    blocks: tuple[Block, ...]
    marks: tuple[Mark, ...]
    """Of the blocks."""
    depth: int
    most: int
    """How many blocks free anything."""
    small_bytes: int
    """What the forward saved in tensors that are too small to leave."""
    recompute: frozenset[int] = frozenset()
    stale: bool = True
    slowdown: float = 0.0
    """What the step may still wait, where it may become longer: see `leanest_blocks`."""
    aim: float = 1.0
    """How much of the memory a choice may take: less once a choice took more than was thought."""
    misses: int = 0


class BlockBook:
    """Which blocks each kind of forward recomputes, so that what it saves fits `memory_bytes`.

    Without that: so that as little as can is in memory in a step `tolerated_slowdown` longer.
    """

    def __init__(self, memory_bytes: int | None, tolerated_slowdown: float = 0.0) -> None:
        self._memory_bytes, self._slowdown = memory_bytes, tolerated_slowdown
        self.wanted = memory_bytes is not None or tolerated_slowdown > 0
        self.marks = Marks()
        self._choices: OrderedDict[BlockKey, _Choice] = OrderedDict()
        self._others: dict[BlockKey, int] = {}
        """How often such a forward turned out to have other blocks than were chosen among."""

    def recompute_of(self, key: BlockKey) -> frozenset[int]:
        """Return the numbers of the blocks to recompute."""
        choice = self._choices.get(key)
        return choice.recompute if choice is not None else frozenset()

    def unknown(self, key: BlockKey) -> bool:
        """Say whether such a forward has to be recorded for blocks to be chosen."""
        return key not in self._choices and self._others.get(key, 0) < _MOST_OTHERS

    def is_like(self, key: BlockKey, number: int, mark: Mark) -> bool:
        """Say whether block `number` is the one that was chosen for; if not, forget the choice."""
        choice = self._choices.get(key)
        if choice is None or (number < len(choice.marks) and choice.marks[number] == mark):
            return choice is not None
        del self._choices[key]
        if len(self._others) > _REMEMBERED:
            self._others.clear()
        self._others[key] = self._others.get(key, 0) + 1
        return False

    def learn(
        self,
        runs: BlockRuns,
        trace: Trace,
        depth: int,
        recording: Recording,
        small_bytes: int = 0,
    ) -> None:
        """Take in what a forward without recomputation saved, and when."""
        if runs.key is None or runs.recompute or not self.wanted:
            return
        if self._others.get(runs.key, 0) >= _MOST_OTHERS:
            return
        blocks = runs.blocks(recording)
        most = len(frees_anything(blocks))
        marks = tuple(noted.mark for noted in runs.noted)
        self._choices[runs.key] = _Choice(trace, blocks, marks, depth, most, small_bytes)
        self._choices.move_to_end(runs.key)
        if len(self._choices) > _REMEMBERED:
            self._choices.popitem(last=False)

    def transients(self, runs: BlockRuns) -> list[tuple[int, int]]:
        """Return what recomputation holds for a while: from the first need of a region, bytes."""
        choice = self._choices.get(runs.key) if runs.key is not None else None
        if choice is None:
            return []
        found = []
        for number in sorted(runs.recompute):
            if number < min(len(runs.noted), len(choice.blocks)) and runs.noted[number].enters:
                freed = freed_by(choice.blocks, number)
                tensors = [choice.trace.tensors[index] for index in freed]
                nbytes = sum(tensor.nbytes + tensor.rest_bytes for tensor in tensors)
                nbytes += choice.blocks[number].small_bytes
                if nbytes:
                    found.append((max(runs.noted[number].enters), nbytes))
        return found

    def missed(self, key: BlockKey, peak_bytes: int) -> bool:
        """Take in that a choice's schedule needs `peak_bytes`; say if it is made again.

        More strictly, until all blocks that free anything are recomputed.
        """
        choice = self._choices.get(key)
        if choice is None or self._memory_bytes is None or peak_bytes <= self._memory_bytes:
            return False
        if choice.misses >= _MOST_MISSES or len(choice.recompute) >= choice.most:
            return False
        choice.misses += 1
        choice.aim *= self._memory_bytes / peak_bytes
        choice.stale = True
        return True

    def slowdown_of(self, key: BlockKey | None) -> float:
        """Return how much longer such a step may become by waiting, beside what it recomputes."""
        choice = self._choices.get(key) if key is not None else None
        return self._slowdown if choice is None else choice.slowdown

    def settled(self, runs: BlockRuns) -> bool:
        """Say whether the next forward of this kind will recompute what this one has."""
        choice = self._choices.get(runs.key) if runs.key is not None else None
        return choice is None or (not choice.stale and choice.recompute == runs.recompute)

    def drive_changed(self) -> None:
        """Have every choice made again."""
        for choice in self._choices.values():
            choice.stale, choice.aim, choice.misses = True, 1.0, 0

    def renew(
        self, key: BlockKey, machine: Callable[[int], tuple[Sequence[Channel], Limits]]
    ) -> None:
        """Choose for what was learned; `machine` says what so many forwards at once may use."""
        choice = self._choices.get(key)
        if choice is None or not choice.stale:
            return
        step = choice.trace, choice.blocks, *machine(choice.depth)
        if self._memory_bytes is None:
            found = leanest_blocks(*step, self._slowdown, choice.small_bytes)
            choice.slowdown = found.slowdown
        else:
            aim = int(self._memory_bytes * choice.aim)
            effort = effort_for(choice.trace)
            found = cheapest_blocks(*step, aim, self._slowdown, choice.small_bytes, effort)
            choice.slowdown = self._slowdown
        choice.recompute, choice.stale = found.recompute, False
