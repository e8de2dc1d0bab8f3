"""A tape of all layers on which a part of a layer is one operator, made of a tape of a few layers.

What parts save are few tensors, so that the tape of a deep model is still planned for at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from perfmodel.memory import entering
from perfmodel.tape import Operator, Tape, Value

__all__ = ["TAKEN_DOWN", "CoarseTape", "Stack"]

TAKEN_DOWN = 4
"""Layers of a stack that are on the tape of a few."""
_PARTS = 4  # of a layer, whose saved tensors leave and come back together
_TYPICAL = 2  # a layer with others before and behind it


@dataclass(frozen=True)
class Stack:
    """Equal layers, one behind the other, and those few of them that are on the tape."""

    layers: int
    first: int
    """The number of its first block on the tape."""
    few: tuple[range, ...]

    @property
    def more(self) -> int:
        """How many are not on the tape."""
        return self.layers - TAKEN_DOWN

    @property
    def typical(self) -> int:
        """The number of a block that has others of the stack before and behind it."""
        return self.first + _TYPICAL

    @property
    def layer(self) -> range:
        """The operators of that block."""
        return self.few[_TYPICAL]


class CoarseTape:
    """The tape of `stacks`, a few of whose layers are on `tape` and take `forward_s`.

    What is smaller than `least` is a tensor by itself.
    """

    def __init__(
        self, tape: Tape, stacks: Sequence[Stack], forward_s: Sequence[float], least: int
    ) -> None:
        self._few, self._stacks = tape, stacks
        self._forward_s, self._least = forward_s, least
        self._operators: list[Operator] = []
        self._blocks: list[range] = []
        self.parts: list[range] = []
        """Which operators of the few layers each of this tape's stands for."""
        self.tape = self._taken_down()

    def _taken_down(self) -> Tape:
        begins = [*(stack.few[0].start for stack in self._stacks), len(self._few.operators)]
        streams = [Value("stream", self._entering(stack)[0]) for stack in self._stacks]
        self._add(range(begins[0]), (), streams[0])
        for at, stack in enumerate(self._stacks):
            x = self._layers(stack, streams[at])
            *behind, last = self._split(range(stack.few[-1].stop, begins[at + 1]))
            for part in behind:
                self._add(part, (x,))
            self._add(last, (x,), *streams[at + 1 : at + 2])
        return Tape(tuple(self._operators), tuple(self._blocks))

    def _layers(self, stack: Stack, x: Value) -> Value:
        """Take down all layers that `x` goes through; return what it becomes."""
        parts, others = self._split(stack.layer), self._others(stack)
        saved = [other for other, saves in others.items() if saves]
        for _ in range(stack.layers):
            self._blocks.append(range(len(self.parts), len(self.parts) + len(parts)))
            out = Value("stream", x.nbytes)
            self._add(parts[0], (x, *others), saves=(x, *saved))
            for part in parts[1:-1]:
                self._add(part, (x,))
            self._add(parts[-1], (x,), out)
            x = out
        return x

    def _add(
        self, part: range, reads: tuple[Value, ...], *made: Value, saves: tuple[Value, ...] = ()
    ) -> None:
        # What enters a layer first is among what the first part of it saves.
        stream_bytes = saves[0].nbytes if saves else 0
        saves = (*saves, *self._saved_in(part, stream_bytes))
        self._operators.append(Operator("part", reads, made, saves))
        self.parts.append(part)

    def _split(self, block: range) -> list[range]:
        """Return parts of a block that take about as long as each other."""
        seconds = [self._forward_s[at] for at in block]
        done = list(accumulate(seconds))
        most = done[-1] if done else 0.0
        cuts = [bisect_left(done, most * part / _PARTS) for part in range(1, _PARTS)]
        edges = [block.start, *(block.start + cut for cut in cuts), block.stop]
        return [range(one, other) for one, other in pairwise(edges)]

    # ---- what is saved -----------------------------------------------------------------------

    @property
    def largest_bytes(self) -> int:
        """Of what a layer saves."""
        return max(self._layer_bytes, default=0)

    @cached_property
    def mean_bytes(self) -> float:
        """Of what a layer saves and is not small."""
        large = [nbytes for nbytes in self._layer_bytes if nbytes >= self._least]
        return sum(large) / len(large) if large else 0.0

    @cached_property
    def _layer_bytes(self) -> list[int]:
        layers = [stack.layer for stack in self._stacks]
        saved = self._first_saved.items()
        return [each.nbytes for each, at in saved if any(at in layer for layer in layers)]

    def _others(self, stack: Stack) -> dict[Value, bool]:
        """Return copies of what enters all layers of a stack alike, and whether they save it."""
        operators = (self._few.operators[at] for at in stack.layer)
        saved = {value.storage for operator in operators for value in operator.saves}
        return {Value(each.name, each.nbytes): each in saved for each in self._entering(stack)[1]}

    def _entering(self, stack: Stack) -> tuple[int, list[Value]]:
        """Return the bytes of the stream that enters a layer, and what enters all of them alike."""
        before = self._few.blocks[stack.typical - 1]
        made = {value.storage for at in before for value in self._few.operators[at].writes}
        storages = entering(self._few, stack.layer)
        # Tables and masks, all that layers without an encoder share, are counted to the stream.
        alone = len(self._stacks) == 1
        others = [each for each in storages if each not in made and (each.trained or not alone)]
        return sum(each.nbytes for each in storages if each not in others), others

    def _saved_in(self, part: range, but: int) -> Iterator[Value]:
        """Yield what a part saves first, without so many bytes, what is small by itself."""
        sizes = [storage.nbytes for storage, at in self._first_saved.items() if at in part]
        large = sum(nbytes for nbytes in sizes if nbytes >= self._least)
        for nbytes in (max(0, large - but), sum(sizes) - large):
            if nbytes:
                yield Value("saved", nbytes)

    @cached_property
    def _first_saved(self) -> dict[Value, int]:
        """Return the operator that saves each storage first."""
        found: dict[Value, int] = {}
        inputs = {value.storage for value in self._few.inputs}
        for at, operator in enumerate(self._few.operators):
            for value in operator.saves:
                if value.storage not in inputs:
                    found.setdefault(value.storage, at)
        return found
