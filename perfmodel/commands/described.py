"""Predictions as people read them in a terminal, and as programs do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from perfmodel.commands.tables import ascii_line, days, digits, gib, table
from perfmodel.machine import Machine
from perfmodel.plan import TIERS
from perfmodel.planner import Found
from perfmodel.prediction import Prediction
from perfmodel.states import held_bytes
from perfmodel.workload import Workload

__all__ = [
    "LIMITS",
    "NOTHING_FITS",
    "activations_of",
    "choices_table",
    "details",
    "heading",
    "nothing_fits",
    "prediction_json",
    "states_of",
    "tb_per_day",
]

HEADER = (
    "choice",
    "activations",
    "states",
    "batch",
    "device GiB",
    "host GiB",
    "SSD GiB",
    "step s",
    "tokens/s",
    "SSD TB/day",
    "SSD life",
)
NOTHING_FITS = 3
"""An exit status."""
PHASES = {"": "always", "backward": "forward, backward", "update": "update"}

LIMITS = {
    "device_bytes": "device memory",
    "host_bytes": "host memory",
    "pinned_bytes": "pinned memory",
    "ssd_bytes": "space on the SSD",
    "ssd_write_bytes_per_day": "writes to the SSD a day",
}


def heading(workload: Workload, machine: Machine, *, batch: bool = True) -> str:
    """Return one line: what is trained, on what, and with `batch` how much of it a step has."""
    model, parallel = workload.model, workload.parallel
    devices = f"{parallel.ranks} x {machine.device.name}"
    if parallel.ranks > machine.devices:
        devices += f" on {-(-parallel.ranks // machine.devices)} machines"
    shared = [
        f"{key.replace('_', '-')} {getattr(parallel, key)}"
        for key in ("data", "zero_stage", "tensor", "pipeline", "chunks", "context")
        if getattr(parallel, key) > (key != "zero_stage")
    ]
    shared += ["sequence-parallel"] if parallel.sequence else []
    lora = f", LoRA of rank {workload.lora_rank}" if workload.lora_rank else ""
    tokens = f": {workload.tokens:,} tokens a step, in sequences of {workload.seq_len:,}"
    tokens = tokens if batch else ""
    return ascii_line(
        f"{model.name or 'a model'}, {model.num_params:,} parameters, on {machine.name} ({devices}"
        f"{': ' + ', '.join(shared) if shared else ''}), {workload.framework}, {workload.dtype}"
        f"{lora}{tokens}"
    )


def activations_of(prediction: Prediction) -> str:
    """Return what becomes of activations."""
    strategy = prediction.strategy
    if strategy.recompute is None:
        return strategy.activations
    if strategy.activations == "recompute":
        return f"recompute {len(strategy.recompute)}"
    again = len(strategy.recompute)
    return f"{strategy.activations}, recompute {again}" if again else strategy.activations


def states_of(prediction: Prediction) -> str:
    """Return where the optimizer's states are."""
    strategy = prediction.strategy
    return "torch" if strategy.optimizer == "torch" else strategy.placement


def tb_per_day(prediction: Prediction, machine: Machine) -> float:
    """Return what all of a node's ranks write to its drive, in TB a day."""
    return prediction.ssd_write_bytes_per_day * machine.devices / 1e12


def figures(prediction: Prediction, machine: Machine) -> list[str]:
    """Return the numbers of a row."""
    writes = prediction.ssd_write_bytes > 0
    return [
        gib(prediction.device_bytes),
        gib(prediction.host_bytes),
        gib(prediction.ssd_bytes),
        digits(prediction.step_s),
        digits(prediction.tokens_per_s),
        digits(tb_per_day(prediction, machine)) if writes else "-",
        days(prediction.life_days),
    ]


def batch_of(prediction: Prediction) -> str:
    """Return the sequences of a forward and the forwards of a step."""
    return f"{prediction.workload.micro_batch} x {prediction.workload.accumulation}"


def ranks_of(prediction: Prediction) -> str:
    """Return how ranks share the work."""
    parallel = prediction.workload.parallel
    stages = f"{parallel.pipeline} stages" if parallel.pipeline > 1 else ""
    zero = f"ZeRO-{parallel.zero_stage}" if parallel.zero_stage else ""
    return ", ".join(filter(None, (stages, zero))) or "-"


def choices_table(found: Found, machine: Machine, *, ranks: bool = False) -> list[str]:
    """Return a row for each choice; with `ranks` also how they share the work."""
    rows = [
        [
            choice.name,
            activations_of(choice.prediction),
            states_of(choice.prediction),
            *([ranks_of(choice.prediction)] if ranks else []),
            batch_of(choice.prediction),
            *figures(choice.prediction, machine),
        ]
        for choice in found.choices
    ]
    head = [*HEADER[:3], "ranks", *HEADER[3:]] if ranks else HEADER
    return table(head, rows, left=4 + ranks)


def details(prediction: Prediction) -> list[str]:
    """Return what is in memory, what the step's time goes to, and what is busy."""
    step_s = prediction.step_s
    parts = [
        [name, digits(seconds), f"{seconds / step_s:.0%}"]
        for name, seconds in prediction.parts_s.items()
    ]
    busy = [[name, f"{part:.0%}"] for name, part in sorted(prediction.busy.items())]
    return [
        *table(("memory of a rank", "tier", "held in", "GiB"), _memory(prediction), left=3),
        "",
        *table(("a step", "s", "part"), [*parts, ["together", digits(step_s), "100%"]]),
        "",
        *table(("busy", "part"), busy),
        "",
        f"bottleneck: {prediction.bottleneck}",
    ]


def _memory(prediction: Prediction) -> Iterator[list[str]]:
    """Yield each thing in memory; the tier's total is that of its worse phase."""
    totals = {
        "device": prediction.device_bytes,
        "host": prediction.host_bytes,
        "ssd": prediction.ssd_bytes,
    }
    for tier in TIERS:
        held = [each for each in prediction.held if each.tier == tier]
        for each in held:
            pinned = " (pinned)" if each.pinned else ""
            yield [f"{each.name}{pinned}", tier, PHASES[each.phase], gib(each.nbytes)]
        worst = max(held_bytes(held, tier, phase) for phase in ("backward", "update"))
        if totals[tier] > worst and tier == "device":
            yield ["CUDA, and gaps of its allocator", tier, "always", gib(totals[tier] - worst)]
        if held:
            yield ["at the most at once", tier, "", gib(totals[tier])]


def nothing_fits(found: Found) -> str:
    """Return why nothing fits, and with what change something would."""
    said = f"nothing fits: none of {found.tried} tried"
    if found.closest is not None:
        said += (
            f"; the closest has activations {activations_of(found.closest)}, states "
            f"{states_of(found.closest)}, {batch_of(found.closest)}"
        )
    over = [
        f"{digits(nbytes / 1e12)} TB over its writes of a day"
        if key == "ssd_write_bytes_per_day"
        else f"{gib(nbytes)} GiB over its {LIMITS.get(key, key)}"
        for key, nbytes in (found.over or {}).items()
    ]
    said += f" and is {', '.join(over)}" if over else ""
    return ascii_line(said + (f". {found.change}" if found.change else ""))


def prediction_json(prediction: Prediction, machine: Machine) -> dict[str, Any]:
    """Return a prediction of JSON's types."""
    return {
        "strategy": asdict(prediction.strategy),
        "micro_batch": prediction.workload.micro_batch,
        "accumulation": prediction.workload.accumulation,
        "step_s": prediction.step_s,
        "tokens_per_s": prediction.tokens_per_s,
        "device_bytes": prediction.device_bytes,
        "host_bytes": prediction.host_bytes,
        "pinned_bytes": prediction.pinned_bytes,
        "ssd_bytes": prediction.ssd_bytes,
        "ssd_write_bytes": prediction.ssd_write_bytes,
        "ssd_write_bytes_per_day_of_drive": tb_per_day(prediction, machine) * 1e12,
        "life_days": prediction.life_days,
        "bottleneck": prediction.bottleneck,
        "parts_s": dict(prediction.parts_s),
        "busy": dict(prediction.busy),
        "held": [asdict(each) for each in prediction.held],
    }
