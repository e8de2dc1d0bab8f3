"""What a whole step takes of a machine: seconds, what they go to, and the bytes of every tier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from perfmodel.activation_step import ActivationStep, activation_step, of_each, staged, under_way
from perfmodel.cluster import forwards_under_way
from perfmodel.endurance import DAY_S, life_days
from perfmodel.layers import CPU, CUDA, TRANSFORMERS, TRANSFORMERS_CUDA, Shape, stage_tape
from perfmodel.machine import Machine
from perfmodel.model import Model
from perfmodel.network import RankTraffic, operator_network_s, rank_traffic
from perfmodel.operator_times import OperatorTimes, operator_times
from perfmodel.parameters import rank_parameters, zero_count
from perfmodel.plain_models import plain_shape
from perfmodel.shape import MEGATRON
from perfmodel.states import Held, held, held_bytes
from perfmodel.tape import Tape
from perfmodel.update_step import UpdateStep, update_step
from perfmodel.workload import Strategy, Workload

__all__ = [
    "MARGIN",
    "Prediction",
    "combined",
    "device_memory_bytes",
    "first_stage_tape",
    "predict",
    "rank_layers",
    "rank_tape",
    "rank_times",
    "shape_of",
    "step_parts",
    "zeroed_s",
]

MARGIN = 0.03
"""Of a GPU's memory: what its allocator cannot use between tensors of other sizes."""
# A CUDA context and the libraries' workspaces, which no tensor has.
_CONTEXT_BYTES = 900 << 20


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One step of a strategy, of each rank where nothing else is said."""

    workload: Workload
    strategy: Strategy
    step_s: float
    parts_s: Mapping[str, float]
    """What the step goes to: computing, and what is waited for beside. They add up to `step_s`."""
    busy: Mapping[str, float]
    """Which part of the step each resource is in use."""
    held: tuple[Held, ...]
    """Everything in memory, activations among it."""
    device_bytes: int
    host_bytes: int
    pinned_bytes: int
    ssd_bytes: int
    ssd_write_bytes: int
    """Written in a step."""
    life_days: float | None
    """Until the drive's rated endurance is used up by all its ranks; None: not rated or not
    written."""

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.workload.tokens / self.step_s

    @property
    def ssd_write_bytes_per_day(self) -> float:
        """Of one rank."""
        return self.ssd_write_bytes / self.step_s * DAY_S

    @property
    def bottleneck(self) -> str:
        """What the step goes to, and what it waits for most, in words."""
        computing_s = sum(self.parts_s.get(name, 0.0) for name in _COMPUTING)
        waits = {name: s for name, s in self.parts_s.items() if name not in _COMPUTING}
        worst = max(waits, key=lambda name: waits[name], default="")
        share = computing_s / self.step_s
        if not worst or waits[worst] < 0.01 * self.step_s:
            return f"computing, {share:.0%} of the step"
        waited = f"{worst}, {waits[worst] / self.step_s:.0%}"
        if waits[worst] > computing_s:
            return f"{waited} of the step; computing takes {share:.0%}"
        return f"computing, {share:.0%} of the step; what it waits for most is {waited}"


_COMPUTING = ("forward", "backward", "recompute")


def predict(
    workload: Workload, strategy: Strategy, machine: Machine, *, effort: float = 0.2
) -> Prediction:
    """Return what a step of `workload` takes with `strategy`.

    `effort`: as for `plan_activations`. Raises ValueError for what the machine does not have, or
    what is not modelled.
    """

    def one(tape: Tape, forwards: float) -> ActivationStep:
        times, part = rank_times(tape, workload, machine), of_each(strategy, forwards)
        return activation_step(tape, times, machine, part, effort=effort)

    first, last = forwards_under_way(workload.parallel, workload.accumulation)
    step = one(rank_tape(workload, machine), last)
    if workload.parallel.pipeline > 1:
        step = staged(step, one(first_stage_tape(workload, machine), first))
    return combined(workload, strategy, machine, step, update_step(workload, strategy, machine))


def shape_of(workload: Workload, machine: Machine) -> Shape:
    """Return how much of the model's input a rank has at once, in which kernels."""
    cpu = machine.link is None
    if workload.plain:
        kernels = replace(CPU if cpu else CUDA, fused_attention=workload.fused_attention)
        return plain_shape(
            workload.plain,
            batch=workload.micro_batch,
            seq_len=workload.seq_len,
            element_bytes=workload.element_bytes,
            kernels=kernels,
        )
    if workload.framework == "megatron":
        kernels = MEGATRON
    else:
        kernels = TRANSFORMERS if cpu else TRANSFORMERS_CUDA
    parallel = workload.parallel
    return Shape(
        batch=workload.micro_batch,
        seq_len=workload.seq_len,
        element_bytes=workload.element_bytes,
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        context=parallel.context,
        kernels=replace(kernels, fused_attention=workload.fused_attention),
    )


def rank_layers(workload: Workload) -> tuple[int, ...]:
    """Return the layers of the rank that has the most: of an encoder, if any, and of the rest."""
    model = workload.model
    decoder = -(-model.num_layers // workload.parallel.pipeline)
    return (model.encoder_layers, decoder) if model.encoder_layers else (decoder,)


def rank_tape(workload: Workload, machine: Machine, layers: int | None = None) -> Tape:
    """Return the operators of the rank with the most to do: of a pipeline, its last stage.

    That stage has the loss besides as many layers as another has. `layers`: of a stage with so many
    instead, and of an encoder with so many.
    """
    model, first = workload.model, workload.parallel.pipeline == 1
    number = rank_layers(workload)[-1] if layers is None else layers
    if layers is not None and model.encoder_layers:
        model = replace(model, num_layers=layers, encoder_layers=layers)
    which = range(model.num_layers - number, model.num_layers)
    return _stage(model, shape_of(workload, machine), which, first, True, workload.lora_rank)


def first_stage_tape(workload: Workload, machine: Machine, layers: int | None = None) -> Tape:
    """Return the operators of the first of a pipeline's several stages, as `rank_tape` the last's.

    It has nothing behind the layers, but most micro-batches under way.
    """
    which = range(rank_layers(workload)[-1] if layers is None else layers)
    shape = shape_of(workload, machine)
    return _stage(workload.model, shape, which, True, False, workload.lora_rank)


@lru_cache(maxsize=64)
def _stage(
    model: Model, shape: Shape, layers: range, first: bool, last: bool, lora_rank: int
) -> Tape:
    return stage_tape(model, shape, layers, first=first, last=last, lora_rank=lora_rank)


def rank_times(tape: Tape, workload: Workload, machine: Machine) -> OperatorTimes:
    """Return the operators' seconds, and those of what ranks send each other in them."""
    times = operator_times(tape.operators, machine.device, workload.dtype)
    if workload.parallel.tensor * workload.parallel.context == 1:
        return times
    ways = zip(tape.operators, times.forward_s, times.backward_s, strict=True)
    forward_s, backward_s = [], []
    for each, ahead_s, back_s in ways:
        sent_s, sent_back_s = operator_network_s(each, workload.parallel, machine)
        forward_s.append(ahead_s + sent_s)
        backward_s.append(back_s + sent_back_s)
    return OperatorTimes(tuple(forward_s), tuple(backward_s))


def combined(
    workload: Workload,
    strategy: Strategy,
    machine: Machine,
    step: ActivationStep,
    update: UpdateStep,
) -> Prediction:
    """Return the step that so many of these forwards and backwards make, and one update."""
    parallel, times = workload.parallel, workload.accumulation
    traffic = rank_traffic(workload, machine)
    parts = step_parts(
        step,
        update,
        traffic,
        zeroed_s(workload, machine),
        times=times,
        bubble=(parallel.pipeline - 1) / parallel.chunks,
        early_gradients=strategy.early_gradients,
    )
    step_s = sum(parts.values())
    items = _items(workload, strategy, machine, step)
    host = held_bytes(items, "host", "backward"), held_bytes(items, "host", "update")
    written = times * step.written_bytes + update.ssd_bytes
    return Prediction(
        workload=workload,
        strategy=strategy,
        step_s=step_s,
        parts_s={name: seconds for name, seconds in parts.items() if seconds},
        busy=_busy(workload, machine, step, update, step_s, traffic.busy_s(times)),
        held=items,
        device_bytes=_device_bytes(items, machine),
        host_bytes=max(host),
        pinned_bytes=sum(each.nbytes for each in items if each.tier == "host" and each.pinned),
        ssd_bytes=held_bytes(items, "ssd", "backward"),
        ssd_write_bytes=written,
        life_days=_life_days(machine, written / step_s * DAY_S),
    )


def step_parts(
    step: ActivationStep,
    update: UpdateStep,
    traffic: RankTraffic,
    zeroed: float,
    *,
    times: int,
    bubble: float,
    early_gradients: bool,
) -> dict[str, float]:
    """Return the seconds of a step of so many forwards and backwards, by what they go to.

    `bubble`: of a pipeline, in forwards and backwards; `zeroed`: of setting gradients to nothing.
    """
    gradients_s = update.gradients_s
    if early_gradients:  # beside the last backward
        gradients_s = max(0.0, gradients_s - step.backward_s)
    return {
        "forward": times * step.forward_s,
        "backward": times * step.backward_s,
        "recompute": times * step.recompute_s,
        "activation transfers": times * (step.stall_s + step.processor_s),
        "pipeline bubble": bubble * (step.duration_s + traffic.sent_s),
        "network": traffic.waited_s(times, step.backward_s, step.duration_s),
        "gradient transfers": gradients_s,
        "update": update.update_s + zeroed,
    }


def _device_bytes(items: Sequence[Held], machine: Machine) -> int:
    nbytes = max(held_bytes(items, "device", phase) for phase in ("backward", "update"))
    return device_memory_bytes(nbytes, machine)


def device_memory_bytes(tensor_bytes: int, machine: Machine) -> int:
    """Return the memory of a device that so many bytes of tensors need."""
    if machine.link is None:
        return tensor_bytes
    return round(tensor_bytes * (1 + MARGIN)) + _CONTEXT_BYTES


def _life_days(machine: Machine, bytes_per_day: float) -> float | None:
    drive = machine.drive
    if drive is None or not drive.rated_bytes or not bytes_per_day:
        return None
    return life_days(bytes_per_day * machine.devices, drive.rated_bytes)


def _items(
    workload: Workload, strategy: Strategy, machine: Machine, step: ActivationStep
) -> tuple[Held, ...]:
    """Return everything in memory; activations of all micro-batches that are under way."""
    alone = machine.link is None
    found = [
        each
        for each in held(workload, strategy, device_is_host=alone)
        if each.name != "staging of activations"
    ]
    taken = under_way(step, forwards_under_way(workload.parallel, workload.accumulation))
    found.append(Held("activations", "device", taken.device_bytes, phase="backward"))
    for name, nbytes in (
        ("staging of activations", step.staging_bytes),
        ("activations", taken.host_bytes),
    ):
        if nbytes:
            found.append(Held(name, "host", nbytes, pinned=True, phase="backward"))
    if taken.ssd_bytes:
        found.append(Held("activations", "ssd", taken.ssd_bytes, phase="backward"))
    return tuple(found)


def zeroed_s(workload: Workload, machine: Machine) -> float:
    """Return the seconds in which gradients are set to nothing, of those that a rank keeps."""
    trained = [each for each in rank_parameters(workload) if each.trained]
    shared = workload.parallel.zero_stage > 1
    count = zero_count(workload, trained) if shared else sum(each.count for each in trained)
    nbytes = max(1, workload.gradient_element_bytes * count)
    return nbytes / machine.device.memory_bytes_per_s.at(nbytes)


def _busy(
    workload: Workload,
    machine: Machine,
    step: ActivationStep,
    update: UpdateStep,
    step_s: float,
    network_s: float,
) -> dict[str, float]:
    """Return the part of the step in which each resource has something to do."""
    times = workload.accumulation
    computing_s = times * (step.forward_s + step.backward_s + step.recompute_s)
    seconds = {name: value for name, value in update.busy_s.items() if value}
    seconds["device"] = seconds.get("device", 0.0) + computing_s
    drive, link = machine.drive, machine.link
    if link is not None and step.moved_bytes:
        for name, rate in (
            ("to host", link.to_host_bytes_per_s),
            ("to device", link.to_device_bytes_per_s),
        ):
            seconds[name] = seconds.get(name, 0.0) + times * step.moved_bytes / rate
    if drive is not None and step.written_bytes:
        for name, rate in (
            ("ssd write", drive.write_bytes_per_s),
            ("ssd read", drive.read_bytes_per_s),
        ):
            more = times * step.written_bytes / rate * machine.devices
            seconds[name] = seconds.get(name, 0.0) + more
    if network_s:
        seconds["network"] = network_s
    return {name: min(1.0, value / step_s) for name, value in seconds.items()}
