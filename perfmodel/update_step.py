"""The optimizer's update at the end of a step on one rank, wherever its states lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from perfmodel.machine import Machine
from perfmodel.parameters import rank_parameters, zero_count
from perfmodel.plan import OptimizerConfig, update_schedule_of
from perfmodel.schedules.subgroup_size import planned_subgroup_params, streamed_subgroup_params
from perfmodel.schedules.updates import (
    STATE_BYTES,
    UpdateRates,
    UpdateSchedule,
    named_schedule,
    plan_updates,
    simulate_updates,
)
from perfmodel.workload import Strategy, Workload

__all__ = ["UpdateStep", "subgroup_params", "update_rates", "update_step", "updated_count"]

_FP32_BYTES = 4
# Of a parameter where nothing moves: gradient, master copy and moments read, all but it written.
_UPDATED_BYTES = 28
# Of queueing one that moves, three calls from Python; a run that is not planned measures its own.
_SUBGROUP_S = 1e-4
# So many subgroups stand for all: what is simulated are shares, not each one.
_SUBGROUPS = 32


@dataclass(frozen=True, kw_only=True)
class UpdateStep:
    """What an update takes."""

    update_s: float
    """From the last gradient's arrival to the last parameter's."""
    gradients_s: float = 0.0
    """Of gradients on their way to where they are used."""
    ssd_bytes: int = 0
    """Written to the SSD, and as much read."""
    busy_s: Mapping[str, float] = field(default_factory=dict)
    """For how long each resource is busy."""
    schedule: UpdateSchedule | None = None


def update_step(workload: Workload, strategy: Strategy, machine: Machine) -> UpdateStep:
    """Return what the update of a rank's share of the parameters takes.

    Raises ValueError where the machine lacks what the placement names.
    """
    count = updated_count(workload)
    if strategy.optimizer == "torch":
        seconds = count / _device_rate(machine)
        return UpdateStep(update_s=seconds, busy_s={"device": seconds})
    shares = strategy.shares
    on_ssd = round(count * shares.get("ssd", 0.0))
    rest = count - on_ssd
    moved = _from_ssd(workload, on_ssd, machine) if on_ssd else UpdateStep(update_s=0.0)
    stay = _in_memory(workload, strategy, rest, machine) if rest else UpdateStep(update_s=0.0)
    names = {*moved.busy_s, *stay.busy_s}
    busy = {name: moved.busy_s.get(name, 0.0) + stay.busy_s.get(name, 0.0) for name in names}
    # Those on the SSD come and go while others are updated, all by one host.
    together_s = max(moved.update_s, stay.update_s, busy.get("host update", 0.0))
    return UpdateStep(
        update_s=together_s,
        gradients_s=moved.gradients_s + stay.gradients_s,
        ssd_bytes=moved.ssd_bytes,
        busy_s=busy,
        schedule=stay.schedule,
    )


def updated_count(workload: Workload) -> int:
    """Return how many parameters a rank updates."""
    return zero_count(workload, [each for each in rank_parameters(workload) if each.trained])


def subgroup_params(workload: Workload, strategy: Strategy, machine: Machine) -> int | None:
    """Return how many parameters a subgroup is best to have; None where it makes no difference."""
    count = updated_count(workload)
    if machine.link is None or strategy.optimizer == "torch" or not count:
        return None
    from_ssd = "ssd" in strategy.shares
    return planned_subgroup_params(
        count,
        replace(update_rates(workload, machine), subgroup_s=_SUBGROUP_S),
        device_bytes=machine.device.memory_bytes,
        most=streamed_subgroup_params(OptimizerConfig(), from_ssd=True) if from_ssd else None,
    )


def update_rates(workload: Workload, machine: Machine) -> UpdateRates:
    """Return a rank's share of a machine with a link. Raises ValueError without one."""
    link, host, ranks = machine.link, machine.host, machine.devices
    if link is None:
        raise ValueError(f"{machine.name!r} has no link between a device and its host")
    return UpdateRates(
        device_params_per_s=_device_rate(machine),
        host_params_per_s=host.update_params_per_s / ranks,
        to_device_bytes_per_s=link.to_device_bytes_per_s,
        to_host_bytes_per_s=link.to_host_bytes_per_s,
        host_memory_bytes_per_s=host.memory_bytes_per_s / ranks,
        duplex=link.both_bytes_per_s
        > 1.3 * max(link.to_device_bytes_per_s, link.to_host_bytes_per_s),
        param_bytes=workload.element_bytes,
    )


def _device_rate(machine: Machine) -> float:
    device = machine.device
    return device.update_params_per_s or device.memory_bytes_per_s.at(1e9) / _UPDATED_BYTES


def _host_rate(machine: Machine) -> float:
    """Return the parameters a second of a rank's share of the host."""
    return machine.host.update_params_per_s / machine.devices


def _in_memory(workload: Workload, strategy: Strategy, count: int, machine: Machine) -> UpdateStep:
    if machine.link is None:  # device and host are one memory, and one processor
        seconds = count / _host_rate(machine)
        return UpdateStep(update_s=seconds, busy_s={"host update": seconds})
    shares = {tier: part for tier, part in strategy.shares.items() if tier != "ssd"}
    resident = shares.get("device", 0.0) / sum(shares.values())
    rates = update_rates(workload, machine)
    # DeepSpeed has fp32 parameters and gradients on the host, beside their states.
    lent = (
        workload.framework == "deepspeed" and workload.parallel.zero_stage > 0 and "host" in shares
    )
    if lent:
        rates = replace(rates, params_on="host", param_bytes=_FP32_BYTES)
    sizes = _sizes(count)
    if update_schedule_of(strategy.update_schedule)[0] == "auto":
        schedule = plan_updates(sizes, rates, resident=resident)
    else:
        schedule = named_schedule(strategy.update_schedule, sizes, resident=resident)
    timeline = simulate_updates(schedule, rates)
    part = 1.0 if lent else schedule.share("host")  # of gradients, and of parameters on their way
    copied_s = count * workload.element_bytes * part / rates.to_device_bytes_per_s
    sent_s = count * workload.element_bytes * part / rates.to_host_bytes_per_s
    moved = count * schedule.share("moved")
    along = _FP32_BYTES if lent else 0
    return UpdateStep(
        # What is on the host has been updated before DeepSpeed sends any of it.
        update_s=timeline.duration_s + (copied_s if lent else 0.0),
        gradients_s=sent_s,
        busy_s={
            "device": timeline.busy_s("device"),
            "host update": timeline.busy_s("host"),
            "to device": moved * (STATE_BYTES + along) / rates.to_device_bytes_per_s + copied_s,
            "to host": moved * STATE_BYTES / rates.to_host_bytes_per_s + sent_s,
        },
        schedule=schedule,
    )


def _sizes(count: int) -> Sequence[int]:
    """Return subgroups of all parameters, few enough to be simulated at once."""
    size = max(1, math.ceil(count / _SUBGROUPS))
    whole, rest = divmod(count, size)
    return [size] * whole + [rest] * (rest > 0)


def _from_ssd(workload: Workload, count: int, machine: Machine) -> UpdateStep:
    """Return the update of what comes from the SSD and goes back there."""
    drive = machine.drive
    if drive is None:
        raise ValueError(
            f"placement has a share on the ssd, and {machine.name!r} has no drive: add `drive` to "
            "its machine.json (offload calibrate PATH measures it)"
        )
    # Without a device fp32 parameters are their own master copies, and so are DeepSpeed's.
    alone = machine.link is None and workload.dtype == "float32"
    zero = workload.framework == "deepspeed" and workload.parallel.zero_stage > 0
    rows = 2 if alone or zero else 3
    nbytes = 4 * rows * count
    read_s = nbytes / drive.read_bytes_per_s * machine.devices
    write_s = nbytes / drive.write_bytes_per_s * machine.devices
    both_s = max(read_s, write_s, 2 * nbytes / drive.mixed_bytes_per_s * machine.devices)
    update_s = count / _host_rate(machine)
    sent_s = back_s = 0.0
    if machine.link is not None:
        sent_s = count * workload.element_bytes / machine.link.to_host_bytes_per_s
        back_s = count * workload.element_bytes / machine.link.to_device_bytes_per_s
    elif drive.processor_bytes_per_s:  # one processor copies, checks and updates
        update_s += 2 * nbytes / drive.processor_bytes_per_s / machine.host.cores
    return UpdateStep(
        update_s=max(both_s, update_s, back_s),
        gradients_s=sent_s,
        ssd_bytes=nbytes,
        busy_s={
            "ssd read": read_s,
            "ssd write": write_s,
            "host update": update_s,
            "to host": sent_s,
            "to device": back_s,
        },
    )
