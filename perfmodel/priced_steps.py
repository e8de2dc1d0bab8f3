"""The forward and backward of one micro-batch, each strategy of its activations priced once."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate

from perfmodel.activation_step import (
    WINDOW_TENSORS,
    ActivationStep,
    activation_step,
    of_each,
    staged,
)
from perfmodel.cluster import forwards_under_way
from perfmodel.layered_step import EFFORT, TAKEN_DOWN, LayeredStep
from perfmodel.machine import Machine
from perfmodel.memory import step_bytes
from perfmodel.prediction import (
    MARGIN,
    device_memory_bytes,
    first_stage_tape,
    rank_layers,
    rank_tape,
    rank_times,
)
from perfmodel.tape import Tape
from perfmodel.workload import Strategy, Workload

__all__ = ["PricedSteps"]

_FEWEST_LAYERS = TAKEN_DOWN + 2
_LEAST_STAGING = 64 << 20
_MOST_STAGING = 4 << 30
# Predicted to 0.1 % at worst where measured; what a run keeps is filled up to this.
_KEPT_TO = 0.995
_ROOMS = 6
_COUNTS = 32


class PricedSteps:
    """The forwards and backwards of one micro-batch and number of stages."""

    def __init__(self, workload: Workload, machine: Machine) -> None:
        self._workload, self._machine, parallel = workload, machine, workload.parallel
        self._layers = rank_layers(workload)
        self._found: dict[Strategy, ActivationStep] = {}
        self.forwards = forwards_under_way(parallel, workload.accumulation)
        # Of a model with an encoder there are no stages.
        whole = parallel.pipeline == 1 or not workload.model.encoder_layers
        few = min(self._layers) >= _FEWEST_LAYERS and whole
        down = TAKEN_DOWN if few else None
        self._last = _Stage(rank_tape(workload, machine, down), workload, machine, few)
        self._first: _Stage | None = None
        if parallel.pipeline > 1:
            ahead = first_stage_tape(workload, machine, down)
            self._first = _Stage(ahead, workload, machine, few)

    def step(self, strategy: Strategy) -> ActivationStep:
        """Return what a strategy takes, as far as a search asks: from a few layers, and quickly."""
        if strategy not in self._found:
            first, last = (of_each(strategy, count) for count in self.forwards)
            step = self._last.step(last)
            if self._first:
                step = staged(step, self._first.step(first))
            self._found[strategy] = step
        return self._found[strategy]

    def thorough(self, strategy: Strategy) -> ActivationStep:
        """Return what it takes from all layers, with a search for what leaves as a run makes it."""
        first, last = (of_each(strategy, count) for count in self.forwards)
        workload, machine = self._workload, self._machine
        tape = rank_tape(workload, machine)
        times = rank_times(tape, workload, machine)
        step = activation_step(tape, times, machine, last, effort=EFFORT)
        if self._first is None:
            return step
        ahead = first_stage_tape(workload, machine)
        times = rank_times(ahead, workload, machine)
        return staged(step, activation_step(ahead, times, machine, first, effort=EFFORT))

    @cached_property
    def kept(self) -> ActivationStep:
        """Return the step in which everything stays."""
        return self.step(Strategy())

    def counts(self) -> list[int]:
        """Return how many layers may be run again: any number of them, or many if they are more."""
        layers, layered = sum(self._layers), self._last.layered
        some = {round(part * layers / _COUNTS) for part in range(1, _COUNTS)}
        some = {each for each in some if layered is None or layered.stands_for(each)}
        return [*sorted(some - {0, layers}), layers]

    def repeated(self, again: int) -> tuple[Strategy, ActivationStep]:
        """Return the strategy in which the first `again` layers are run again."""
        which = None if again == sum(self._layers) else tuple(range(again))
        strategy = Strategy(activations="recompute", recompute=which)
        return strategy, self.step(strategy)

    def reaches(self, tier: str) -> bool:
        """Say whether activations can go there."""
        return (self._machine.link if tier == "host" else self._machine.drive) is not None

    def all_moved(
        self, tier: str, room: float, taken: Sequence[int]
    ) -> Iterator[tuple[Strategy, ActivationStep]]:
        """Yield `tier` with as little on the device as costs no time, and as some rooms force.

        `taken`: what else may be on the device, of which there is `room`.
        """
        yield self._moved(tier, None)
        for left in self._rooms(room, taken):
            yield self._moved(tier, left)

    def _moved(self, tier: str, memory_bytes: int | None) -> tuple[Strategy, ActivationStep]:
        strategy = Strategy(
            activations=tier, memory_bytes=memory_bytes, staging_bytes=self._staging_bytes
        )
        return strategy, self.step(strategy)

    @cached_property
    def _staging_bytes(self) -> int:
        """Of a few of the largest tensors, which go through one after the other."""
        tensors = 2 if self._machine.link is None else 4
        return min(_MOST_STAGING, max(_LEAST_STAGING, tensors * self._last.largest_bytes))

    def _rooms(self, room: float, taken: Sequence[int]) -> list[int]:
        """Return what saved tensors may take beside each of `taken`, if not all of them fit."""
        found, lefts = set(), [self.left(room, each) for each in taken]
        saved = max(map(operator.mul, self.forwards, (each.saved_bytes for each in self._kept)))
        for left in lefts:
            if 0 < left < saved:
                # Rooms that are alike are one.
                found.add(int(left / saved * _ROOMS) / _ROOMS or left)
        if not found and min(lefts) <= 0:
            found.add(0.0)  # as little as there can be
        return sorted(int(each * saved if each < 1 else each) for each in found)

    def left(self, room: float, taken: int) -> float:
        """Return what saved tensors may take of a device with `room`, beside what is `taken`.

        No less than all of them where they fit.
        """
        moving = self._last.largest_bytes * WINDOW_TENSORS
        if self._machine.link is None:
            # Staging is on the device, beside what a run holds to its limit.
            moving = self._staging_bytes
        available = self._available(room, taken) - moving
        behind = self._kept[0].saved_bytes  # of each forward that waits for its backward
        stages = (self._first or self._last), self._last
        return min(
            stage.left(available, round((count - 1) * behind))
            for stage, count in zip(stages, self.forwards, strict=True)
        )

    def _available(self, room: float, taken: int) -> float:
        """Return what of a device with `room` a step may take beside what is `taken`."""
        most = room * _KEPT_TO - device_memory_bytes(taken, self._machine)
        return most if self._machine.link is None else most / (1 + MARGIN)

    @property
    def _kept(self) -> tuple[ActivationStep, ActivationStep]:
        """Return the first and the last stage's."""
        return self.kept.first or self.kept, self.kept


class _Stage:
    """One stage, on whose tape there are a `few` layers or all."""

    def __init__(self, tape: Tape, workload: Workload, machine: Machine, few: bool) -> None:
        self._tape, self._machine, self._layers = tape, machine, rank_layers(workload)
        self._times = rank_times(tape, workload, machine)
        self.layered: LayeredStep | None = None
        if few:
            least = Strategy().min_tensor_bytes
            self.layered = LayeredStep(tape, self._times, self._layers, machine, least)

    def step(self, strategy: Strategy) -> ActivationStep:
        """Return what a strategy takes."""
        if self.layered is None:
            return activation_step(self._tape, self._times, self._machine, strategy, effort=0.0)
        every = sum(self._layers) if strategy.activations == "recompute" else 0
        again = every if strategy.recompute is None else len(strategy.recompute)
        return self.layered.step(strategy, again, effort=0.0)

    @property
    def largest_bytes(self) -> int:
        """Of a tensor that is saved."""
        saved = (value.storage.nbytes for each in self._tape.operators for value in each.saves)
        return self.layered.largest_bytes if self.layered else max(saved, default=0)

    def left(self, available: float, behind: int) -> float:
        """Return what saved tensors may take where all tensors of a step have `available`.

        `behind`: what forwards before it have saved. All of that where nothing has to leave.
        """
        sizes, others = self._worst_others
        at = bisect_right(sizes, available - behind)
        return available - others[at] if at < len(sizes) else available

    @cached_property
    def _worst_others(self) -> tuple[list[int], list[int]]:
        """Return the bytes of each moment, and the most that is not saved at it or a larger one."""
        moments = self.layered.moments() if self.layered else step_bytes(self._tape).moments
        ordered = sorted((each.nbytes, each.other_bytes) for each in moments)
        most = [*accumulate((other for _, other in reversed(ordered)), max)]
        return [nbytes for nbytes, _ in ordered], most[::-1]
