"""A forward and backward of many equal layers, from the tape of a few of them.

What grows with the layers grows by as much with each: bytes that all layers before have saved, and
seconds. So that a planner can try thousands of strategies in a second, four layers are taken down
and stand for all.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise

from perfmodel.activation_step import (
    ActivationStep,
    channels_of,
    limited,
    processor_s,
    room_for_saved,
    run_again,
)
from perfmodel.machine import Machine
from perfmodel.memory import StepBytes, entering, step_bytes
from perfmodel.operator_times import OperatorTimes
from perfmodel.schedules.stall import stall_s
from perfmodel.schedules.trace import Limits
from perfmodel.step_trace import StepTrace, step_trace
from perfmodel.tape import Operator, Tape, TapeWriter, Value
from perfmodel.workload import Strategy

__all__ = ["EFFORT", "TAKEN_DOWN", "LayeredStep"]

TAKEN_DOWN = 4
"""Layers of the tape that stands for all."""
EFFORT = 0.05
"""Of the search for what leaves: enough not to move what need not."""
_PARTS = 4  # of a layer, whose saved tensors leave and come back together
_BEFORE, _AFTER = -1, TAKEN_DOWN
_TYPICAL = 2  # a layer with others before and behind it
_WINDOW_TENSORS = 2


class LayeredStep:
    """Steps of `layers` equal layers, of which `tape` has four.

    Raises ValueError for a tape of others, or fewer layers than that.
    """

    def __init__(
        self, tape: Tape, times: OperatorTimes, layers: int, machine: Machine, least: int
    ) -> None:
        if len(tape.blocks) != TAKEN_DOWN or layers < TAKEN_DOWN:
            raise ValueError(
                f"{len(tape.blocks)} layers cannot stand for {layers}; it takes {TAKEN_DOWN}"
            )
        self._tape, self._times, self._machine = tape, times, machine
        self._layers, self._least = layers, least
        self._more = layers - TAKEN_DOWN
        self._cost: dict[tuple[int, ...], StepBytes] = {}

    # ---- seconds -----------------------------------------------------------------------------

    @cached_property
    def forward_s(self) -> float:
        """Of all layers and what is around them."""
        return sum(self._times.forward_s) + self._more * self._of(self._times.forward_s, _TYPICAL)

    @cached_property
    def backward_s(self) -> float:
        """Without what is run again."""
        return sum(self._times.backward_s) + self._more * self._of(self._times.backward_s, _TYPICAL)

    def _of(self, seconds: Sequence[float], block: int) -> float:
        return sum(seconds[at] for at in self._tape.blocks[block])

    def recompute_s(self, count: int) -> float:
        """Return the seconds of running the first `count` layers again."""
        first, typical = (
            sum(self._times.forward_s[at] for at in run_again(self._tape, number))
            for number in (0, _TYPICAL)
        )
        return first + (count - 1) * typical if count else 0.0

    # ---- bytes -------------------------------------------------------------------------------

    def step(self, strategy: Strategy, again: int = 0, *, effort: float = EFFORT) -> ActivationStep:
        """Return the step in which the first `again` layers are run again.

        `effort`: as for `plan_activations`.
        Raises ValueError where only one layer is of a kind, and for what the machine does not have.
        """
        moves = strategy.activations in ("host", "ssd")
        if moves:
            return self._moved(strategy, again, effort)
        peak, saved = self._peak(again)
        return ActivationStep(
            forward_s=self.forward_s,
            backward_s=self.backward_s,
            recompute_s=self.recompute_s(again),
            device_bytes=peak,
            saved_bytes=saved,
        )

    def _cost_of(self, again: tuple[int, ...]) -> StepBytes:
        if again not in self._cost:
            self._cost[again] = step_bytes(self._tape, again)
        return self._cost[again]

    def _few(self, again: int) -> tuple[int, ...]:
        """Return which of the few layers are run again so that they stand for all."""
        if again in (0, self._layers):
            return tuple(range(TAKEN_DOWN)) if again else ()
        if not 2 <= again <= self._layers - 2:
            raise ValueError(
                f"{again} of {self._layers} layers run again: one alone stands for none"
            )
        return (0, 1)

    def _grown(self, again: int, region: int) -> int:
        """Return by how many saved bytes all layers have more than the few before a region."""
        kept, repeated = self._unit(()), self._unit(tuple(range(TAKEN_DOWN)))
        if again in (0, self._layers):
            return (region >= TAKEN_DOWN - 1) * self._more * (repeated if again else kept)
        more = (region >= 1) * (again - 2) * repeated
        return more + (region >= TAKEN_DOWN - 1) * (self._layers - again - 2) * kept

    def _unit(self, again: tuple[int, ...]) -> int:
        """Return what one more layer of a kind saves."""
        seen: dict[int, int] = {}
        for moment in self._cost_of(again).moments:
            if not moment.backward:
                seen.setdefault(moment.at, moment.saved_bytes)
        one, other = (seen[self._tape.blocks[number].start] for number in (_TYPICAL, _TYPICAL + 1))
        return other - one

    def _peak(self, again: int) -> tuple[int, int]:
        """Return the most bytes at once, and what a forward leaves."""
        few = self._cost_of(self._few(again))
        grown = {region: self._grown(again, region) for region in range(_BEFORE, _AFTER + 1)}
        peak = max(moment.nbytes + grown[self._region(moment.at)] for moment in few.moments)
        return peak, few.saved_bytes + grown[_AFTER]

    def _region(self, at: int) -> int:
        blocks = self._tape.blocks
        if at < blocks[0].start:
            return _BEFORE
        return next((number for number, block in enumerate(blocks) if at in block), _AFTER)

    # ---- what leaves -------------------------------------------------------------------------

    def _moved(self, strategy: Strategy, again: int, effort: float) -> ActivationStep:
        channel = channels_of(self._machine, strategy.activations)
        found = self.trace(again)
        # Grouped as they are, tensors are larger than what staging has at once.
        room = room_for_saved(self._machine, strategy)
        schedule = limited(found, channel, Limits(), room, effort)
        to_ssd, alone = strategy.activations == "ssd", self._machine.link is None
        limit = math.inf if room is None else room
        waited_s = stall_s(schedule, found.trace, [channel], Limits(), limit)
        staging = strategy.staging_bytes if to_ssd else 0
        window = min(schedule.moved_bytes, _WINDOW_TENSORS * self.largest_bytes)
        kept = schedule.peak_bytes + found.small_bytes
        return ActivationStep(
            forward_s=self.forward_s,
            backward_s=self.backward_s,
            recompute_s=self.recompute_s(again),
            stall_s=waited_s,
            processor_s=processor_s(self._machine, 2 * schedule.moved_bytes) if to_ssd else 0.0,
            device_bytes=self._beside(again, kept) + (staging if alone else window),
            saved_bytes=self._peak(again)[1] - schedule.moved_bytes,
            staging_bytes=0 if alone else staging,
            host_bytes=0 if to_ssd else schedule.moved_bytes,
            ssd_bytes=schedule.moved_bytes if to_ssd else 0,
            schedule=schedule,
        )

    @cached_property
    def largest_bytes(self) -> int:
        """Of what a layer saves."""
        layer = self._tape.blocks[_TYPICAL]
        return max(
            (each.nbytes for each, at in self._first_saved.items() if at in layer), default=0
        )

    def _beside(self, again: int, kept: int) -> int:
        """Return the most at once where all saved tensors take `kept` bytes at their worst."""
        moments = self._cost_of(self._few(again)).moments
        grown = {region: self._grown(again, region) for region in range(_BEFORE, _AFTER + 1)}
        return max(
            moment.other_bytes + min(kept, moment.saved_bytes + grown[self._region(moment.at)])
            for moment in moments
        )

    def trace(self, again: int) -> StepTrace:
        """Return the trace of all layers, in which the tensors of a part of a layer are one."""
        parts = self._coarse_parts
        ways = (self._times.forward_s, self._times.backward_s)
        coarse = OperatorTimes(*(tuple(sum(s[at] for at in part) for part in parts) for s in ways))
        return step_trace(self._coarse, coarse, self._least, range(again))

    @cached_property
    def _coarse_parts(self) -> list[range]:
        """Return the operators of the few layers that stand for those of all, part by part."""
        blocks = self._tape.blocks
        layer = self._parts(blocks[_TYPICAL])
        behind = range(blocks[-1].stop, len(self._tape.operators))
        return [range(blocks[0].start), *layer * self._layers, *self._parts(behind)]

    def _parts(self, block: range) -> list[range]:
        """Return parts of a block that take about as long as each other."""
        seconds = [self._times.forward_s[at] for at in block]
        done = list(accumulate(seconds))
        most = done[-1] if done else 0.0
        cuts = [bisect_left(done, most * part / _PARTS) for part in range(1, _PARTS)]
        edges = [block.start, *(block.start + cut for cut in cuts), block.stop]
        return [range(one, other) for one, other in pairwise(edges)]

    @cached_property
    def _coarse(self) -> Tape:
        """Return a tape of one operator for each part."""
        blocks, writer, parts = self._tape.blocks, TapeWriter(), self._coarse_parts
        stream = sum(storage.nbytes for storage in entering(self._tape, blocks[_TYPICAL]))
        x = writer.value("stream", stream)
        operators = [Operator("before", (), (x,), tuple(self._saved_in(parts[0], 0)))]
        for at, part in enumerate(parts[1:]):
            begins, inside = at % _PARTS == 0, at < _PARTS * self._layers
            out = writer.value("stream", stream) if (at + 1) % _PARTS == 0 else x
            # What enters a layer is among what its first part saves.
            enters = (x,) if begins and inside else ()
            saved = self._saved_in(part, stream if enters else 0)
            operators.append(Operator("part", (x,), () if out is x else (out,), (*enters, *saved)))
            x = out
        starts = range(1, 1 + _PARTS * self._layers, _PARTS)
        return Tape(tuple(operators), tuple(range(at, at + _PARTS) for at in starts))

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
        inputs = {value.storage for value in self._tape.inputs}
        for at, operator in enumerate(self._tape.operators):
            for value in operator.saves:
                if value.storage not in inputs:
                    found.setdefault(value.storage, at)
        return found
