"""What a planner chooses from: what becomes of activations, and of states, each priced once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from perfmodel.activation_step import ActivationStep, UnderWay, under_way
from perfmodel.machine import Machine
from perfmodel.network import RankTraffic, rank_traffic
from perfmodel.prediction import device_memory_bytes, step_parts, zeroed_s
from perfmodel.priced_steps import PricedSteps
from perfmodel.states import held, held_bytes
from perfmodel.update_step import UpdateStep, subgroup_params, update_step, updated_count
from perfmodel.workload import Parallel, Strategy, Workload, some_batches

__all__ = ["ActivationChoice", "Searched", "StatesChoice"]

_MICRO_BATCHES = 12
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
    thorough: bool = False
    """What leaves was searched for as a run does it, or nothing leaves."""

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
        self._priced: dict[tuple[int, int], PricedSteps] = {}
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
                chunks = parallel.chunks if stages > 1 else 1
                shared = replace(
                    parallel,
                    pipeline=stages,
                    chunks=chunks,
                    data=ranks // stages,
                    zero_stage=stage,
                )
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
        # Megatron's own fp32 parameters lie on the host, and are updated where they lie.
        where = "host" if workload.framework == "megatron" else "auto"
        if "device" in placements:
            yield Strategy(placement="device")
        if "host" in placements and not alone:
            yield Strategy(placement="host", early_gradients=early, update_schedule=where)
            # ZeRO has all fp32 parameters on the device or none.
            whole = workload.framework == "deepspeed" and parallel.zero_stage > 0
            for part in range(1, self._fine if "device" in placements and not whole else 1):
                share = round(part / self._fine, 4)
                mixed = f"host={share:g},device={1 - share:g}"
                yield Strategy(placement=mixed, early_gradients=early, update_schedule=where)
        if "ssd" in placements and drive is not None:
            yield Strategy(placement="ssd", early_gradients=early)
            if "host" in placements and not alone:
                yield Strategy(
                    placement="ssd=0.5,host=0.5", early_gradients=early, update_schedule=where
                )

    def activations(
        self, modes: Sequence[str], room: float, states: Sequence[StatesChoice]
    ) -> Iterator[ActivationChoice]:
        """Yield what may become of activations beside one of `states`, in `room` on the device."""
        workload = states[0].workload
        priced, parallel = self._priced_of(workload), workload.parallel
        taken = [each.device_bytes[0] for each in states]
        for strategy, step in self._priced_steps(priced, modes, room, taken):
            yield ActivationChoice(
                strategy,
                step,
                workload.accumulation,
                (parallel.pipeline - 1) / parallel.chunks,
                priced.forwards,
                thorough=strategy.activations not in ("host", "ssd"),
            )

    def _priced_of(self, workload: Workload) -> PricedSteps:
        key = workload.micro_batch, workload.parallel.pipeline
        if key not in self._priced:
            self._priced[key] = PricedSteps(workload, self._machine)
        return self._priced[key]

    def thorough(self, choice: ActivationChoice, workload: Workload) -> ActivationChoice:
        """Return the same strategy with what leaves searched for as a run does it."""
        step = self._priced_of(workload).thorough(choice.strategy)
        return replace(choice, step=step, thorough=True)

    def refined(
        self, choice: ActivationChoice, room: float, states: StatesChoice
    ) -> ActivationChoice:
        """Return `choice` with no more moved than `room` asks for, if that takes no longer."""
        strategy = choice.strategy
        if strategy.activations not in ("host", "ssd"):
            return choice
        priced = self._priced_of(states.workload)
        left = priced.left(room, states.device_bytes[0])
        if left <= 0:
            return choice
        less = replace(strategy, memory_bytes=int(left))
        step = priced.thorough(less)
        longer = step.duration_s > choice.step.duration_s * _SAME
        if longer or step.moved_bytes > choice.step.moved_bytes:
            return choice
        return replace(choice, strategy=less, step=step, thorough=True)

    def _priced_steps(
        self, priced: PricedSteps, modes: Sequence[str], room: float, taken: Sequence[int]
    ) -> Iterator[tuple[Strategy, ActivationStep]]:
        kept = priced.kept
        if "keep" in modes:
            yield Strategy(), kept
        if "recompute" in modes:
            for again in priced.counts():
                yield priced.repeated(again)
        for tier in ("host", "ssd"):
            if tier in modes and priced.reaches(tier):
                yield from priced.all_moved(tier, room, taken)
