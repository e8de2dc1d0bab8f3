"""A forward and backward of many equal layers, from the tape of a few of them.

What grows with the layers grows by as much with each: bytes that all layers before have saved, and
seconds. So that a planner can try thousands of strategies in a second, four layers are taken down
and stand for all; of an encoder and its decoder four each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from operator import add

from perfmodel.activation_step import (
    WINDOW_TENSORS,
    ActivationStep,
    channels_of,
    limited,
    processor_s,
    run_again,
)
from perfmodel.coarse_tape import TAKEN_DOWN, CoarseTape, Stack
from perfmodel.machine import Machine
from perfmodel.memory import Moment, StepBytes, step_bytes
from perfmodel.operator_times import OperatorTimes
from perfmodel.schedules.slowdown import Slowdowns
from perfmodel.schedules.stall import stall_s
from perfmodel.schedules.trace import Limits
from perfmodel.step_trace import StepTrace, step_trace
from perfmodel.tape import Tape
from perfmodel.workload import Strategy

__all__ = ["EFFORT", "TAKEN_DOWN", "LayeredStep"]

EFFORT = 0.05
"""Of the search for what leaves: enough not to move what need not."""


class LayeredStep:
    """Steps of stacks of `layers` equal layers, of which `tape` has four each, the encoder's first.

    Raises ValueError for a tape of others, or fewer layers than that.
    """

    def __init__(
        self, tape: Tape, times: OperatorTimes, layers: Sequence[int], machine: Machine, least: int
    ) -> None:
        if len(tape.blocks) != TAKEN_DOWN * len(layers) or min(layers) < TAKEN_DOWN:
            raise ValueError(
                f"{len(tape.blocks)} layers cannot stand for {' and '.join(map(str, layers))}; "
                f"it takes {TAKEN_DOWN} of each kind"
            )
        self._tape, self._times, self._machine = tape, times, machine
        self._least = least
        self._stacks = tuple(
            Stack(count, first, tape.blocks[first : first + TAKEN_DOWN])
            for first, count in zip(range(0, len(tape.blocks), TAKEN_DOWN), layers, strict=True)
        )
        self._cost: dict[tuple[int, ...], StepBytes] = {}
        self._grown_by: dict[int, list[int]] = {}
        self._traces: dict[int, StepTrace] = {}
        self._slowdowns: dict[tuple[int, str], Slowdowns] = {}

    # ---- seconds -----------------------------------------------------------------------------

    @cached_property
    def forward_s(self) -> float:
        """Of all layers and what is around them."""
        return self._all_s(self._times.forward_s)

    @cached_property
    def backward_s(self) -> float:
        """Without what is run again."""
        return self._all_s(self._times.backward_s)

    def _all_s(self, seconds: Sequence[float]) -> float:
        more_s = (stack.more * sum(seconds[at] for at in stack.layer) for stack in self._stacks)
        return sum(more_s, sum(seconds))

    def recompute_s(self, again: int) -> float:
        """Return the seconds of running the first `again` layers again."""
        taken_s = 0.0
        for stack, count in self._shared_out(again):
            first, typical = (
                sum(self._times.forward_s[at] for at in run_again(self._tape, number))
                for number in (stack.first, stack.typical)
            )
            taken_s += first + (count - 1) * typical if count else 0.0
        return taken_s

    def _shared_out(self, again: int) -> Iterator[tuple[Stack, int]]:
        """Yield each stack, and how many of its layers are among the first `again`."""
        for stack in self._stacks:
            count = min(again, stack.layers)
            again -= count
            yield stack, count

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

    def stands_for(self, again: int) -> bool:
        """Say whether the few layers stand for all where the first `again` are run again."""
        return all(
            count in (0, stack.layers) or 2 <= count <= stack.layers - 2
            for stack, count in self._shared_out(again)
        )

    def _few(self, again: int) -> tuple[int, ...]:
        """Return which of the few layers are run again so that they stand for all."""
        if not self.stands_for(again):
            layers = sum(stack.layers for stack in self._stacks)
            raise ValueError(f"{again} of {layers} layers run again: one alone stands for none")
        return tuple(
            stack.first + number
            for stack, count in self._shared_out(again)
            for number in range(TAKEN_DOWN if count == stack.layers else min(count, 2))
        )

    def _grown(self, again: int) -> list[int]:
        """Return for each moment by how many saved bytes all layers have more before it."""
        if again not in self._grown_by:
            points = [*self._growth(again)]
            grown = [
                sum(nbytes for begin, nbytes in points if at >= begin)
                for at in range(len(self._tape.operators))
            ]
            moments = self._cost_of(self._few(again)).moments
            self._grown_by[again] = [grown[moment.at] for moment in moments]
        return self._grown_by[again]

    def _growth(self, again: int) -> Iterator[tuple[int, int]]:
        """Yield from which operator on there are how many more bytes saved."""
        for stack, count in self._shared_out(again):
            # The last but one may need more than the last: gradients that others add to.
            begin, rest = stack.layer.start, stack.layers - count
            if not count:
                yield begin, stack.more * self._unit(stack, ())
            elif not rest:
                yield begin, stack.more * self._unit(stack, self._all)
            else:
                yield stack.few[1].start, (count - 2) * self._unit(stack, self._all)
                yield begin, (rest - 2) * self._unit(stack, ())

    @property
    def _all(self) -> tuple[int, ...]:
        return tuple(range(len(self._tape.blocks)))

    def _unit(self, stack: Stack, again: tuple[int, ...]) -> int:
        """Return what one more layer of a kind saves."""
        seen: dict[int, int] = {}
        for moment in self._cost_of(again).moments:
            if not moment.backward:
                seen.setdefault(moment.at, moment.saved_bytes)
        one, other = (seen[self._tape.blocks[stack.typical + more].start] for more in (0, 1))
        return other - one

    def _peak(self, again: int) -> tuple[int, int]:
        """Return the most bytes at once, and what a forward leaves."""
        few, grown = self._cost_of(self._few(again)), self._grown(again)
        peak = max(map(add, (moment.nbytes for moment in few.moments), grown))
        return peak, few.saved_bytes + sum(nbytes for _, nbytes in self._growth(again))

    # ---- what leaves -------------------------------------------------------------------------

    def _moved(self, strategy: Strategy, again: int, effort: float) -> ActivationStep:
        channel = channels_of(self._machine, strategy.activations)
        if again not in self._traces:
            self._traces[again] = self.trace(again)
        found, key = self._traces[again], (again, strategy.activations)
        # Grouped as they are, tensors are larger than what staging has at once.
        if key not in self._slowdowns:
            self._slowdowns[key] = Slowdowns(found.trace, [channel], Limits())
        room = strategy.memory_bytes
        schedule = limited(found, channel, Limits(), room, effort, self._slowdowns[key])
        to_ssd, alone = strategy.activations == "ssd", self._machine.link is None
        limit = math.inf if room is None else room
        waited_s = stall_s(schedule, found.trace, [channel], Limits(), limit)
        staging = strategy.staging_bytes if to_ssd else 0
        window = min(schedule.moved_bytes, WINDOW_TENSORS * self.largest_bytes)
        kept = schedule.peak_bytes + found.small_bytes
        if alone and room is not None:  # a run moves no more than the limit asks for
            kept = max(kept, room)
        return ActivationStep(
            forward_s=self.forward_s,
            backward_s=self.backward_s,
            recompute_s=self.recompute_s(again),
            stall_s=waited_s,
            processor_s=self._held_up_s(schedule.moved_bytes) if to_ssd else 0.0,
            device_bytes=self._beside(again, kept) + (staging if alone else window),
            saved_bytes=self._peak(again)[1] - schedule.moved_bytes,
            staging_bytes=0 if alone else staging,
            host_bytes=0 if to_ssd else schedule.moved_bytes,
            ssd_bytes=schedule.moved_bytes if to_ssd else 0,
            schedule=schedule,
        )

    def _held_up_s(self, moved_bytes: int) -> float:
        tensors = moved_bytes / max(1.0, self._coarse.mean_bytes)
        return processor_s(self._machine, 2 * moved_bytes, tensors)

    @property
    def largest_bytes(self) -> int:
        """Of what a layer saves."""
        return self._coarse.largest_bytes

    def _beside(self, again: int, kept: int) -> int:
        """Return the most at once where all saved tensors take `kept` bytes at their worst."""
        moments = self._cost_of(self._few(again)).moments
        return max(
            moment.other_bytes + min(kept, moment.saved_bytes + grown)
            for moment, grown in zip(moments, self._grown(again), strict=True)
        )

    def moments(self) -> Iterator[Moment]:
        """Yield the worst of all layers' moments where nothing is run again or leaves."""
        few, grown = self._cost_of(()).moments, self._grown(0)
        for moment, more in zip(few, grown, strict=True):
            yield replace(moment, saved_bytes=moment.saved_bytes + more)

    def trace(self, again: int) -> StepTrace:
        """Return the trace of all layers, in which the tensors of a part of a layer are one."""
        parts, ways = self._coarse.parts, (self._times.forward_s, self._times.backward_s)
        coarse = OperatorTimes(*(tuple(sum(s[at] for at in part) for part in parts) for s in ways))
        return step_trace(self._coarse.tape, coarse, self._least, range(again))

    @cached_property
    def _coarse(self) -> CoarseTape:
        return CoarseTape(self._tape, self._stacks, self._times.forward_s, self._least)
