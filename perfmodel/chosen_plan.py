"""The plan of a strategy that was predicted: what it needs of each tier stands in it as a limit.

A run's own defaults are others (half of what is free on an SSD, a quarter of the host's memory), so
that a plan without limits would be planned for one room and run in another.
"""

from __future__ import annotations

import math
from dataclasses import replace

from perfmodel.machine import Machine
from perfmodel.plan_file import Limits, Plan, Predicted
from perfmodel.prediction import Prediction
from perfmodel.update_step import update_step

__all__ = ["plan_of"]

_SLACK = 1.1
"""Pages, and tensors that are freed a moment later than predicted."""


def plan_of(
    prediction: Prediction,
    machine: Machine,
    *,
    path: tuple[str, ...] = (),
    limits: Limits | None = None,
) -> Plan:
    """Return the plan of `prediction`. Raises ValueError where an SSD has no `path`."""
    plan = Plan.of(
        prediction.workload,
        prediction.strategy,
        machine=machine,
        path=path,
        limits=limits,
        predicted=Predicted(
            step_s=prediction.step_s,
            peak_device_bytes=prediction.device_bytes,
            peak_host_bytes=prediction.host_bytes,
            ssd_bytes=prediction.ssd_bytes,
            ssd_write_bytes=prediction.ssd_write_bytes,
            tokens_per_s=prediction.tokens_per_s,
        ),
    )
    states = update_step(prediction.workload, prediction.strategy, machine).ssd_bytes
    moved = max(0, prediction.ssd_write_bytes - states)
    a_day = limits.ssd_write_bytes_per_day if limits is not None else None
    ranks = prediction.workload.parallel.ranks
    sharing = ranks if machine.link is None else min(machine.devices, ranks)
    daily = None if a_day is None else a_day / sharing / max(1, moved + states)
    section, optimizer = plan.activations, plan.optimizer
    if section.offload is not None and section.offload.tier == "host":
        room = _room(prediction, "host", activations=True)
        section = replace(section, offload=replace(section.offload, host_bytes=room))
    elif section.offload is not None:
        offload = replace(
            section.offload,
            spill_bytes=_room(prediction, "ssd", activations=True),
            ssd_write_bytes_per_day=int(daily * moved) or None if daily is not None else None,
        )
        section = replace(section, offload=offload)
    if optimizer is not None and "ssd" in optimizer.shares:
        optimizer = replace(
            optimizer,
            spill_bytes=_room(prediction, "ssd", activations=False),
            ssd_write_bytes_per_day=int(daily * states) or None if daily is not None else None,
        )
    return replace(plan, activations=section, optimizer=optimizer)


def _room(prediction: Prediction, tier: str, *, activations: bool) -> int | None:
    """Return what a tier is to have room for, of activations or of states; None: as it comes."""
    nbytes = sum(
        each.nbytes
        for each in prediction.held
        if each.tier == tier and (each.name == "activations") is activations
    )
    return math.ceil(_SLACK * nbytes) or None
