"""What a planner chooses from: what becomes of activations, and of states, each priced once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from perfmodel.activation_step import (
    ActivationStep,
    UnderWay,
    activation_step,
    of_each,
    staged,
    under_way,
)
from perfmodel.cluster import forwards_under_way
from perfmodel.layered_step import EFFORT, TAKEN_DOWN, LayeredStep
from perfmodel.machine import Machine
from perfmodel.network import RankTraffic, rank_traffic
from perfmodel.prediction import (
    MARGIN,
    device_memory_bytes,
    first_stage_tape,
    rank_layers,
    rank_tape,
    rank_times,
    step_parts,
    zeroed_s,
)
from perfmodel.states import held, held_bytes
from perfmodel.tape import Tape
from perfmodel.update_step import UpdateStep, subgroup_params, update_step, updated_count
from perfmodel.workload import Parallel, Strategy, Workload, some_batches

__all__ = ["ActivationChoice", "Searched", "StatesChoice"]

_FEWEST_LAYERS = TAKEN_DOWN + 2
_LEAST_STAGING = 64 << 20
_MOST_STAGING = 4 << 30
_MICRO_BATCHES = 12
# What is on its way takes a little of the room for what stays.
_ROUNDED = 0.95
_ROOMS = 6
_SAME = 1.005


@dataclass(frozen=True)
class StatesChoice:
    """Where states lie, and all that a step has in memory and takes beside activations."""

    workload: Workload
    strategy: Strategy
    update: UpdateStep
    traffic: RankTraffic
    zeroed_s: float
    device_bytes: tuple[int, int]
    """While the backward runs, and while the update does."""
    host_bytes: tuple[int, int]
    pinned_bytes: int
    ssd_bytes: int


@dataclass(frozen=True)
class ActivationChoice:
    """What becomes of activations in a forward and backward, of which a step has `repeats`."""

    strategy: Strategy
    step: ActivationStep
    repeats: int
    bubble: float
    """Of a pipeline, in forwards and backwards."""
    forwards: tuple[float, float]
    """How many are under way in a pipeline's first stage, and in its last."""

    @cached_property
    def _taken(self) -> UnderWay:
        return under_way(self.step, self.forwards)

    @property
    def host_bytes(self) -> int:
        """Of the host, staging among it."""
        return self.step.staging_bytes + self._taken.host_bytes

    @property
    def ssd_bytes(self) -> int:
        """On the SSD at once."""
        return self._taken.ssd_bytes

    def device_bytes(self, states: StatesChoice, machine: Machine) -> int:
        """Return the device's memory with `states`."""
        backward, update = states.device_bytes
        return device_memory_bytes(max(backward + self._taken.device_bytes, update), machine)

    def step_s(self, states: StatesChoice) -> float:
        """Return the seconds of a step with `states`."""
        parts = step_parts(
            self.step,
            states.update,
            states.traffic,
            states.zeroed_s,
            times=self.repeats,
            bubble=self.bubble,
            early_gradients=states.strategy.early_gradients,
        )
        return sum(parts.values())

    def written(self, states: StatesChoice) -> int:
        """Return what a step writes to the SSD with `states`."""
        return self.repeats * self.step.written_bytes + states.update.ssd_bytes


class Searched:
    """A workload and a machine, and what can be chosen for them."""

    def __init__(self, workload: Workload, machine: Machine, fine: int) -> None:
        self._workload, self._machine, self._fine = workload, machine, fine
        self._priced: dict[tuple[int, int], _Priced] = {}
        self._updates: dict[tuple[int, Strategy], UpdateStep] = {}
        self._subgroups: dict[tuple[int, bool], int | None] = {}
        self._placed: dict[tuple[Parallel, bool, Strategy], StatesChoice] = {}

    def workloads(
        self, micro_batches: Sequence[int], zero_stages: Sequence[int], pipelines: Sequence[int]
    ) -> Iterator[Workload]:
        """Yield the same step in other forwards, stages of ZeRO, or parts of a pipeline."""
        given = self._workload
        sequences, parallel = given.micro_batch * given.accumulation, given.parallel
        for stages in pipelines or (parallel.pipeline,):
            ranks = parallel.data * parallel.pipeline
            if ranks % stages or (sequences * parallel.data) % (ranks // stages):
                continue
            for stage in zero_stages or (parallel.zero_stage,):
                if stage == 3 and stages > 1:
                    continue
                shared = replace(parallel, pipeline=stages, data=ranks // stages, zero_stage=stage)
                whole = sequences * parallel.data // shared.data
                one = replace(given, parallel=shared, micro_batch=whole, accumulation=1)
                batches = micro_batches or some_batches(whole, given.micro_batch, _MICRO_BATCHES)
                yield from (one.with_batch(size) for size in batches if whole % size == 0)

    def states(
        self, workload: Workload, optimizers: Sequence[str], placements: Sequence[str]
    ) -> Iterator[StatesChoice]:
        """Yield where states may lie."""
        traffic = rank_traffic(workload, self._machine)
        for strategy in self._places(workload, optimizers, placements):
            # Of the forwards it matters only whether there are several.
            strategy = self._in_subgroups(workload, strategy)
            key = workload.parallel, workload.accumulation > 1, strategy
            if key not in self._placed:
                self._placed[key] = self._states(workload, strategy, traffic)
            yield replace(self._placed[key], workload=workload, traffic=traffic)

    def _in_subgroups(self, workload: Workload, strategy: Strategy) -> Strategy:
        if strategy.optimizer == "torch":
            return strategy
        key = updated_count(workload), "ssd" in strategy.shares
        if key not in self._subgroups:
            self._subgroups[key] = subgroup_params(workload, strategy, self._machine)
        return replace(strategy, subgroup_params=self._subgroups[key])

    def _states(self, workload: Workload, strategy: Strategy, traffic: RankTraffic) -> StatesChoice:
        machine = self._machine
        items = held(workload, strategy, device_is_host=machine.link is None)
        phases = ("backward", "update")
        device, host = (
            (held_bytes(items, tier, phases[0]), held_bytes(items, tier, phases[1]))
            for tier in ("device", "host")
        )
        return StatesChoice(
            workload,
            strategy,
            self._update(workload, strategy),
            traffic,
            zeroed_s(workload, machine),
            device,
            host,
            sum(each.nbytes for each in items if each.tier == "host" and each.pinned),
            held_bytes(items, "ssd", phases[0]),
        )

    def _update(self, workload: Workload, strategy: Strategy) -> UpdateStep:
        key = updated_count(workload), strategy
        if key not in self._updates:
            self._updates[key] = update_step(workload, strategy, self._machine)
        return self._updates[key]

    def _places(
        self, workload: Workload, optimizers: Sequence[str], placements: Sequence[str]
    ) -> Iterator[Strategy]:
        alone, drive = self._machine.link is None, self._machine.drive
        # Beside half-precision parameters torch's states would be in half precision as well.
        if "torch" in optimizers and workload.dtype == "float32":
            yield Strategy(optimizer="torch")
        if "offload" not in optimizers:
            return
        # Sums of other ranks' gradients come later than one that has left.
        parallel = workload.parallel
        summed = parallel.data * parallel.context > 1 and parallel.zero_stage < 2
        early = workload.framework == "torch" and not alone and not summed
        if "device" in placements:
            yield Strategy(placement="device")
        if "host" in placements and not alone:
            yield Strategy(placement="host", early_gradients=early)
            for part in range(1, self._fine if "device" in placements else 1):
                share = round(part / self._fine, 4)
                mixed = f"host={share:g},device={1 - share:g}"
                yield Strategy(placement=mixed, early_gradients=early)
        if "ssd" in placements and drive is not None:
            yield Strategy(placement="ssd", early_gradients=early)
            if "host" in placements and not alone:
                yield Strategy(placement="ssd=0.5,host=0.5", early_gradients=early)

    def activations(
        self, modes: Sequence[str], room: float, states: Sequence[StatesChoice]
    ) -> Iterator[ActivationChoice]:
        """Yield what may become of activations beside one of `states`, in `room` on the device."""
        workload = states[0].workload
        key = workload.micro_batch, workload.parallel.pipeline
        if key not in self._priced:
            self._priced[key] = _Priced(workload, self._machine)
        priced, parallel = self._priced[key], workload.parallel
        for strategy, step in self._priced_steps(priced, modes, room, states):
            yield ActivationChoice(
                strategy,
                step,
                workload.accumulation,
                (parallel.pipeline - 1) / parallel.chunks,
                priced.forwards,
            )

    def refined(
        self, choice: ActivationChoice, room: float, states: StatesChoice
    ) -> ActivationChoice:
        """Return `choice` with no more moved than `room` asks for, if that takes no longer."""
        strategy = choice.strategy
        if strategy.activations not in ("host", "ssd"):
            return choice
        workload = states.workload
        priced = self._priced[workload.micro_batch, workload.parallel.pipeline]
        left = priced.left(room, states)
        if left <= 0:
            return choice
        less = replace(strategy, memory_bytes=int(left))
        step = priced.step(less, thorough=True)
        longer = step.duration_s > choice.step.duration_s * _SAME
        if longer or step.moved_bytes > choice.step.moved_bytes:
            return choice
        return replace(choice, strategy=less, step=step)

    def _priced_steps(
        self, priced: _Priced, modes: Sequence[str], room: float, states: Sequence[StatesChoice]
    ) -> Iterator[tuple[Strategy, ActivationStep]]:
        kept = priced.kept
        if "keep" in modes:
            yield Strategy(), kept
        if "recompute" in modes:
            for again in priced.counts(self._fine):
                yield priced.repeated(again)
        for tier in ("host", "ssd"):
            if tier in modes and priced.reaches(tier):
                yield from priced.all_moved(tier, room, states)


class _Priced:
    """The forwards and backwards of one micro-batch and number of stages."""

    def __init__(self, workload: Workload, machine: Machine) -> None:
        self._machine, parallel = machine, workload.parallel
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

    def step(self, strategy: Strategy, *, thorough: bool = False) -> ActivationStep:
        """Return what a strategy takes."""
        if thorough:
            return self._step(strategy, EFFORT)
        if strategy not in self._found:
            self._found[strategy] = self._step(strategy, 0.0)
        return self._found[strategy]

    def _step(self, strategy: Strategy, effort: float) -> ActivationStep:
        first, last = (of_each(strategy, count) for count in self.forwards)
        step = self._last.step(last, effort)
        return staged(step, self._first.step(first, effort)) if self._first else step

    @cached_property
    def kept(self) -> ActivationStep:
        """Return the step in which everything stays."""
        return self.step(Strategy())

    def counts(self, fine: int) -> list[int]:
        """Return how many layers may be run again."""
        layers, layered = sum(self._layers), self._last.layered
        some = {round(part * layers / fine) for part in range(1, fine)}
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
        self, tier: str, room: float, states: Sequence[StatesChoice]
    ) -> Iterator[tuple[Strategy, ActivationStep]]:
        """Yield `tier` with as little on the device as costs no time, and as some rooms force."""
        strategy, free = self._moved(tier, None)
        yield strategy, free
        for left in self._rooms(room, states):
            if left < self._saved_bytes(free):  # else it would only move less
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

    def _rooms(self, room: float, states: Sequence[StatesChoice]) -> list[int]:
        """Return what saved tensors may take beside each of `states`, if not all of them fit."""
        found, saved = set(), self._saved_bytes(self.kept)
        for each in states:
            left = self.left(room, each)
            if 0 < left < saved:
                # Rooms that are alike are one.
                found.add(int(left / saved * _ROOMS) / _ROOMS or left)
        return sorted(int(each * saved if each < 1 else each) for each in found)

    def left(self, room: float, states: StatesChoice) -> float:
        """Return what saved tensors may take of a device with `room` beside `states`."""
        whole = device_memory_bytes(states.device_bytes[0], self._machine)
        # Without a link staging is on the device, beside what a run holds to its limit.
        staging = self._staging_bytes if self._machine.link is None else 0
        return ((room - whole) / (1 + MARGIN) - max(self._beside) - staging) * _ROUNDED

    @property
    def _beside(self) -> tuple[int, int]:
        """Return what the first and the last stage have beside saved tensors, if nothing leaves."""
        first, last = self.kept.first or self.kept, self.kept
        return first.device_bytes - first.saved_bytes, last.device_bytes - last.saved_bytes

    def _saved_bytes(self, step: ActivationStep) -> float:
        """Return what saved tensors of all forwards under way take of a stage, at most."""
        ahead = step.first or step
        stages = zip((ahead, step), self._beside, self.forwards, strict=True)
        return max(
            stage.device_bytes - beside + (count - 1) * ahead.saved_bytes
            for stage, beside, count in stages
        )


class _Stage:
    """One stage, on whose tape there are a `few` layers or all."""

    def __init__(self, tape: Tape, workload: Workload, machine: Machine, few: bool) -> None:
        self._tape, self._machine, self._layers = tape, machine, rank_layers(workload)
        self._times = rank_times(tape, workload, machine)
        self.layered: LayeredStep | None = None
        if few:
            least = Strategy().min_tensor_bytes
            self.layered = LayeredStep(tape, self._times, self._layers, machine, least)

    def step(self, strategy: Strategy, effort: float) -> ActivationStep:
        """Return what a strategy takes."""
        if self.layered is None:
            return activation_step(self._tape, self._times, self._machine, strategy, effort=effort)
        every = sum(self._layers) if strategy.activations == "recompute" else 0
        again = every if strategy.recompute is None else len(strategy.recompute)
        return self.layered.step(strategy, again, effort=effort)

    @property
    def largest_bytes(self) -> int:
        """Of a tensor that is saved."""
        saved = (value.storage.nbytes for each in self._tape.operators for value in each.saves)
        return self.layered.largest_bytes if self.layered else max(saved, default=0)
