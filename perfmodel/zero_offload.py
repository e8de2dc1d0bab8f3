"""How long a step of DeepSpeed's ZeRO-3 takes with its optimizer's states on the host.

Forward and backward go layer by layer: parameters are gathered from all ranks, each layer is run
again before its backward, its gradients are reduced, and those that the host's updates want are
flushed to it. The updates come when all of that is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from perfmodel.layers import CUDA, Kernels, Shape, tape_of
from perfmodel.machine import Machine
from perfmodel.operator_times import operator_times
from perfmodel.schedules.updates import UpdateRates, UpdateSchedule, simulate_updates
from perfmodel.tape import Operator, Tape
from perfmodel.timeline import Task, simulate
from perfmodel.workload import Workload

__all__ = ["GRADIENT_BYTES", "FlushCosts", "Iteration", "simulate_iteration"]

GRADIENT_BYTES = 4
"""Of a parameter's gradient that the device has converted to fp32 before it is copied."""

_NETWORK = "network"


@dataclass(frozen=True, kw_only=True)
class FlushCosts:
    """What no data sheet says of a step. Raises ValueError for a negative one, or no rate."""

    converted_params_per_s: float
    """Gradients that a copy for which the step waits brings to the host: as half-precision numbers
    into pageable memory, where the host makes fp32 of them. Of one rank."""
    step_s: float = 0.0
    """What each step takes beside: norms, checks for overflow, waits for all ranks."""
    layer_s: float = 0.0
    """What each layer's hooks take, in the forward, its repetition and the backward together."""

    def __post_init__(self) -> None:
        """Check the costs."""
        for one in fields(self):
            value = getattr(self, one.name)
            enough = value > 0 if one.name == "converted_params_per_s" else value >= 0
            if not enough:
                raise ValueError(f"{one.name}={value!r} of a flush is too small")


@dataclass(frozen=True)
class Iteration:
    """What a step of all ranks takes, each of which has the same to do."""

    forward_s: float
    backward_s: float
    """Repeated forwards and flushes included."""
    update_s: float
    other_s: float

    @property
    def iteration_s(self) -> float:
        """All of it."""
        return self.forward_s + self.backward_s + self.update_s + self.other_s


@dataclass(frozen=True)
class _Part:
    """What is gathered, run and reduced at once: a layer, or what stands before or behind all."""

    forward_s: float
    backward_s: float
    """With what is run again for it."""
    params: float
    flushed: float
    """Of a rank's own share of `params`, those whose gradients go to the host."""


def simulate_iteration(
    workload: Workload,
    machine: Machine,
    schedule: UpdateSchedule,
    rates: UpdateRates,
    costs: FlushCosts,
    *,
    blocking: bool,
) -> Iteration:
    """Return what a step takes with `schedule`, that of the subgroups of one rank.

    `blocking`: as DeepSpeed has it, the step waits for each gradient's copy, and the host converts
    it; else the device does and goes on, as in Deep Optimizer States. Gradients of subgroups that
    are updated on the device stay there. Raises ValueError unless the ranks are those of ZeRO-3.
    """
    parallel = workload.parallel
    if parallel.zero_stage != 3 or parallel.ranks != parallel.data:
        raise ValueError(
            f"zero_stage={parallel.zero_stage} on {parallel.data} of {parallel.ranks} ranks is not "
            "ZeRO-3 on all of them"
        )
    if parallel.data > 1 and not machine.network_bytes_per_s:
        raise ValueError(f"network_bytes_per_s=0 of {machine.name} joins no {parallel.data} ranks")
    parts = _parts(workload, machine, schedule)
    forward_s = _forward_s(parts, workload, machine)
    backward_s = _backward_s(parts, workload, machine, costs if blocking else None)
    before = workload.accumulation - 1
    if before:  # gradients leave when they are complete
        staying = [replace(part, flushed=0.0) for part in parts]
        backward_s += before * _backward_s(staying, workload, machine, None)
    layers = workload.model.num_layers + workload.model.encoder_layers
    return Iteration(
        forward_s=workload.accumulation * forward_s,
        backward_s=backward_s,
        update_s=simulate_updates(schedule, rates).duration_s,
        other_s=costs.step_s + costs.layer_s * layers * workload.accumulation,
    )


def _parts(workload: Workload, machine: Machine, schedule: UpdateSchedule) -> list[_Part]:
    kernels = Kernels(
        fused_attention=workload.fused_attention,
        fused_rms_norm=CUDA.fused_rms_norm,
        mask_bytes=CUDA.mask_bytes,
    )
    shape = Shape(
        batch=workload.micro_batch,
        seq_len=workload.seq_len,
        element_bytes=workload.element_bytes,
        kernels=kernels,
    )
    parts, begin = [], 0.0
    for operators, again in _runs(tape_of(workload.model, shape)):
        times = operator_times(operators, machine.device, workload.dtype)
        ahead_s, back_s = sum(times.forward_s), sum(times.backward_s)
        params = sum(each.param_bytes for each in operators) / workload.element_bytes
        end = begin + params / workload.parallel.data
        flushed = _on_the_host(schedule, begin, end)
        parts.append(_Part(ahead_s, back_s + ahead_s * again, params, flushed))
        begin = end
    return parts


def _runs(tape: Tape) -> Iterator[tuple[Sequence[Operator], bool]]:
    """Yield the operators of each part, and whether it is run again."""
    at = 0
    for block in tape.blocks:
        if at < block.start:
            yield tape.operators[at : block.start], False
        yield tape.operators[block.start : block.stop], True
        at = block.stop
    if at < len(tape.operators):
        yield tape.operators[at:], False


def _on_the_host(schedule: UpdateSchedule, begin: float, end: float) -> float:
    """Return how many of a rank's parameters from `begin` to `end` the host updates."""
    found, at = 0.0, 0
    for size, place in zip(schedule.sizes, schedule.places, strict=True):
        if place == "host":
            found += max(0.0, min(end, at + size) - max(begin, at))
        at += size
    return found


def _crossing_s(workload: Workload, machine: Machine, params: float) -> float:
    """Return how long it takes to gather `params` from all ranks, or to reduce as many."""
    ranks = workload.parallel.data
    nbytes = params * workload.element_bytes * (ranks - 1) / ranks
    return nbytes / machine.network_bytes_per_s if nbytes else 0.0


def _forward_s(parts: Sequence[_Part], workload: Workload, machine: Machine) -> float:
    tasks: list[Task] = []
    ran: list[int] = []
    for part in parts:
        seconds = _crossing_s(workload, machine, part.params)
        tasks.append(Task("gathers", seconds, _room(ran)))
        tasks.append(Task("device", part.forward_s, (len(tasks) - 1,)))
        ran.append(len(tasks) - 1)
    return simulate(tasks).duration_s


def _room(ran: Sequence[int]) -> tuple[int, ...]:
    """Return what a gather waits for: parameters of two parts are on the device at once."""
    return (ran[-2],) if len(ran) > 1 else ()


def _backward_s(
    parts: Sequence[_Part], workload: Workload, machine: Machine, blocking: FlushCosts | None
) -> float:
    link = machine.link
    rate = link.to_host_bytes_per_s if link is not None else machine.host.memory_bytes_per_s
    tasks: list[Task] = []
    ran: list[int] = []
    flushed: list[int] = []
    for part in reversed(parts):
        seconds = _crossing_s(workload, machine, part.params)
        uses = ((_NETWORK, seconds),) if seconds else ()
        tasks.append(Task("gathers", seconds, _room(ran), uses))
        waits = flushed[-1:] if blocking is not None else []
        tasks.append(Task("device", part.backward_s, (len(tasks) - 1, *waits)))
        ran.append(len(tasks) - 1)
        tasks.append(Task("reductions", seconds, (ran[-1],), uses))
        if part.flushed and blocking is not None:
            took_s = part.flushed / blocking.converted_params_per_s
            tasks.append(Task("host", took_s, (len(tasks) - 1,)))
            flushed.append(len(tasks) - 1)
        elif part.flushed:
            took_s = part.flushed * GRADIENT_BYTES / rate
            tasks.append(Task("to host", took_s, (len(tasks) - 1,)))
    return simulate(tasks, {_NETWORK: 1.0}).duration_s
