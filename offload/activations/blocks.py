"""The blocks of a forward, its layers say: what each saved, and which are computed again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from offload.activations.recording import Recording
from offload.activations.repeatable import Used
from offload.device import can_offload
from perfmodel.schedules.blocks import Block, cheapest_blocks, freed_by, leanest_blocks
from perfmodel.schedules.trace import Channel, Limits, Trace

if TYPE_CHECKING:
    from offload.activations.forward import ForwardPass

__all__ = ["BlockBook", "BlockKey", "BlockRuns", "Running"]

BlockKey = tuple[tuple[int, ...], tuple[tuple[int, ...], ...], bool]
"""The sizes of what was saved before the first block, the shapes of what enters it, and whether it
is in training mode."""

# How many kinds of forward are remembered.
_REMEMBERED = 64
# How often a choice that turned out to take too much memory is made again, more strictly.
_MOST_MISSES = 8


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


class BlockRuns:
    """Runs the blocks of one forward, and notes what each saved and how long it took."""

    def __init__(self) -> None:
        self.key: BlockKey | None = None
        """Of this kind of forward; None before the first block."""
        self.recompute: frozenset[int] = frozenset()
        self.noted: list[Noted] = []
        self.used: Used | None = None
        """By the block that is running, where somebody asks."""

    def run(self, forward: ForwardPass, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Return `function(*args)`, of which the schedule may have only `args` saved.

        Raises RuntimeError for a block that is to be recomputed and changes what it uses.
        """
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if self.key is None:
            self._begin(forward, function, tensors)
        again = len(self.noted) in self.recompute
        alone = forward.owner.running.alone
        recording, first = forward.recording, len(forward.regions)
        begin = recording.mark() if recording is not None else None
        used = self.used = Used(tensors) if again or recording is not None else None
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
                f"block {len(self.noted)} of a forward changes its arguments, or buffers of its "
                "modules, which it did not do before: it is not to be recomputed. Run it without "
                "act.block()"
            )
        if recording is not forward.recording:
            # The first tensor told on which device to look at the clock.
            recording = forward.recording
            begin = recording.begun if recording is not None else None
        end = recording.mark() if recording is not None else None
        saved, enters = range(first, len(forward.regions)), forward.regions_of(tensors)
        self.noted.append(Noted(begin, end, saved, enters, repeatable))
        return out

    def _begin(
        self, forward: ForwardPass, function: Callable[..., Any], tensors: Sequence[torch.Tensor]
    ) -> None:
        """Find out which kind of forward this is, and what it recomputes."""
        sizes = tuple(region.nbytes for region in forward.regions)
        # In another mode the same sizes may come of other operators.
        training = bool(getattr(function, "training", True))
        self.key = sizes, tuple(tuple(tensor.shape) for tensor in tensors), training
        with forward.owner.lock:
            movable = [tensor for tensor in tensors if can_offload(tensor)]
            if movable:  # a mask may be on the host, whatever the device
                forward.meet(min(movable, key=lambda tensor: tensor.is_cpu))
            self.recompute = forward.owner.book.recompute_of(self.key)

    def blocks(self, recording: Recording) -> tuple[Block, ...]:
        """Return the blocks of a forward that was recorded; what none may repeat saves nothing."""
        return tuple(
            Block(
                recording.duration_s(noted.begin, noted.end),
                noted.saved if noted.repeatable else range(0),
                noted.enters,
            )
            for noted in self.noted
        )


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
        if ran:
            used.require_unchanged()
        ran = True
        return alone(function, *tree_unflatten(inputs, spec))

    return checkpoint(run, *leaves, use_reentrant=False)


@dataclass
class _Choice:
    trace: Trace
    blocks: tuple[Block, ...]
    depth: int
    most: int
    """How many blocks free anything."""
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
        self._choices: OrderedDict[BlockKey, _Choice] = OrderedDict()

    def recompute_of(self, key: BlockKey) -> frozenset[int]:
        """Return the numbers of the blocks to recompute."""
        choice = self._choices.get(key)
        return choice.recompute if choice is not None else frozenset()

    def learn(self, runs: BlockRuns, trace: Trace, depth: int, recording: Recording) -> None:
        """Take in what a forward without recomputation saved, and when."""
        wanted = self._memory_bytes is not None or self._slowdown > 0
        if runs.key is None or runs.recompute or not wanted:
            return
        blocks = runs.blocks(recording)
        most = sum(bool(freed_by(blocks, number)) for number in range(len(blocks)))
        self._choices[runs.key] = _Choice(trace, blocks, depth, most)
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
                nbytes = sum(choice.trace.tensors[index].nbytes for index in freed)
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
            found = leanest_blocks(*step, self._slowdown)
            choice.slowdown = found.slowdown
        else:
            found = cheapest_blocks(*step, int(self._memory_bytes * choice.aim), self._slowdown)
            choice.slowdown = self._slowdown
        choice.recompute, choice.stale = found.recompute, False
