"""`perfmodel predict`: what a plan comes to on a machine, beside what it says itself."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from perfmodel.commands.arguments import (
    Parser,
    add_batch,
    add_machine,
    add_model,
    add_ranks,
)
from perfmodel.commands.asked import Asked, asked, require_modelled
from perfmodel.commands.described import (
    LIMITS,
    NOTHING_FITS,
    activations_of,
    details,
    heading,
    prediction_json,
    states_of,
)
from perfmodel.commands.step_chart import step_chart
from perfmodel.commands.tables import digits, gib, json_text, table
from perfmodel.endurance import needed_per_day
from perfmodel.machine import read_machine
from perfmodel.model import Model
from perfmodel.plan_file import Plan, Predicted, read_plan
from perfmodel.planner import limits_of
from perfmodel.prediction import Prediction, predict
from perfmodel.step_timeline import step_timeline
from perfmodel.units import format_bytes
from perfmodel.workload import Parallel, Strategy, Workload

__all__ = ["add_arguments", "run", "strategy_of", "workload_of"]


def add_arguments(parser: Parser) -> None:
    """Add the plan, and what it may be held against."""
    parser.add_argument("plan", metavar="plan.json", help="of `perfmodel plan -o`")
    add_machine(parser)
    add_model(parser)
    add_batch(parser)
    add_ranks(parser)
    parser.add_argument("--json", action="store_true", help="print all as JSON")
    parser.add_argument(
        "-o", "--output", metavar="FILE.svg", help="draw a micro-batch and the update over time"
    )


def run(arguments: argparse.Namespace) -> int:
    """Predict and print. Raises ValueError and OSError for what cannot be used."""
    output = arguments.output
    if output is not None and not output.endswith(".svg"):
        raise ValueError(f"-o {output}: what is drawn is an .svg")
    plan = read_plan(arguments.plan)
    if arguments.model is None and arguments.layers is None:
        wanted = _made_for(plan, arguments)
    else:
        wanted = asked(arguments)
        wanted = replace(wanted, workload=_in_batches(wanted.workload, plan))
        plan.check_workload(wanted.workload)
    workload = _in_batches(wanted.workload, plan)
    require_modelled(workload)
    found = predict(workload, strategy_of(plan), wanted.used_machine)
    same = plan.is_for_machine(wanted.machine)
    if output is not None:
        Path(output).write_text(_drawn(found, wanted), encoding="utf-8")
    over = _over(found, plan, wanted)
    if arguments.json:
        said = asdict(plan.predicted) if plan.predicted is not None else None
        both = {"predicted": prediction_json(found, wanted.used_machine), "plan": said}
        print(json_text({**both, "made_with_this_machine": same, "over": over}))
        return NOTHING_FITS if over else 0
    print(heading(workload, wanted.machine))
    print(f"activations {activations_of(found)}, states {states_of(found)}\n")
    print("\n".join(_beside(found, plan.predicted)) + "\n")
    if plan.machine is not None and not same:
        print("the plan was made with another machine's speeds\n")
    print("\n".join(details(found)))
    for what, (needed, there) in over.items():
        print(
            f"perfmodel: it does not fit: {format_bytes(needed)} of {what}, and there are "
            f"{format_bytes(there)}",
            file=sys.stderr,
        )
    return NOTHING_FITS if over else 0


def _over(found: Prediction, plan: Plan, wanted: Asked) -> dict[str, tuple[float, float]]:
    """Return what is needed and what there is, of each memory that has too little."""
    there = limits_of(wanted.used_machine, plan.limits)
    needed = {
        "device_bytes": found.device_bytes,
        "host_bytes": found.host_bytes,
        "pinned_bytes": found.pinned_bytes,
        "ssd_bytes": found.ssd_bytes,
        "ssd_write_bytes_per_day": needed_per_day(found.ssd_write_bytes / found.step_s),
    }
    return {
        LIMITS[key]: (nbytes, there[key])
        for key, nbytes in needed.items()
        if nbytes > there.get(key, math.inf)
    }


def _drawn(found: Prediction, wanted: Asked) -> str:
    """Return the picture of a step."""
    workload, times = found.workload, found.workload.accumulation
    timeline = step_timeline(workload, found.strategy, wanted.used_machine)
    title = (
        f"{workload.model.name or 'a model'} on {wanted.machine.name}: a forward and backward of "
        f"{workload.micro_batch} x {workload.seq_len:,} tokens"
        f"{f', of which a step has {times}' if times > 1 else ''}, and the update"
    )
    return step_chart(timeline, title=title, peak_bytes=found.device_bytes)


def _in_batches(workload: Workload, plan: Plan) -> Workload:
    """Return `workload` with its sequences in the forwards that a plan has chosen, if as many."""
    micro_batch = plan.micro_batch or workload.micro_batch
    accumulation = plan.accumulation or workload.accumulation
    if micro_batch * accumulation != workload.micro_batch * workload.accumulation:
        return workload
    return workload.with_batch(micro_batch)


def _made_for(plan: Plan, arguments: argparse.Namespace) -> Asked:
    given = [
        f"--{key.replace('_', '-')}"
        for key, value in vars(arguments).items()
        if key not in ("plan", "machine", "output", "json", "command", "run") and value
    ]
    if given:
        raise ValueError(f"{given[0]} is nothing without --model, or the numbers of one")
    if plan.workload is None or plan.workload.of is None:
        raise ValueError(f"--model is missing: {arguments.plan} does not say what it was made for")
    return Asked(workload_of(plan.workload.of), read_machine(arguments.machine))


def workload_of(of: Mapping[str, Any]) -> Workload:
    """Return the workload that a plan was made for. Raises ValueError for what is none."""
    try:
        parts = {"model": Model(**of["model"]), "parallel": Parallel(**of["parallel"])}
        return Workload(**{**of, **parts})
    except (TypeError, KeyError) as error:
        raise ValueError(f"workload.of is no workload: {error}") from None


def strategy_of(plan: Plan) -> Strategy:
    """Return what a plan says as a strategy; `auto` counts as what it goes to."""
    section, optimizer = plan.activations, plan.optimizer
    chosen: dict[str, Any] = {"activations": section.mode, "recompute": section.recompute}
    if section.offload is not None:
        chosen |= {
            "activations": section.offload.tier,
            "memory_bytes": section.offload.memory_bytes,
            "staging_bytes": section.offload.staging_bytes,
            "min_tensor_bytes": section.offload.min_tensor_bytes,
        }
    if optimizer is None:
        return Strategy(**chosen, optimizer="torch")
    placement = optimizer.placement
    if placement == "auto":
        (placement,) = optimizer.shares
    return Strategy(
        **chosen,
        placement=placement,
        update_schedule=optimizer.update_schedule,
        early_gradients=optimizer.early_gradients,
        subgroup_params=optimizer.subgroup_params,
    )


def _beside(found: Prediction, said: Predicted | None) -> list[str]:
    then = None if said is None else asdict(said)
    rows = []
    for name, form, now, key in (
        ("step s", digits, found.step_s, "step_s"),
        ("tokens/s", digits, found.tokens_per_s, "tokens_per_s"),
        ("device GiB", gib, found.device_bytes, "peak_device_bytes"),
        ("host GiB", gib, found.host_bytes, "peak_host_bytes"),
        ("SSD GiB", gib, found.ssd_bytes, "ssd_bytes"),
        ("SSD GiB written", gib, found.ssd_write_bytes, "ssd_write_bytes"),
    ):
        value = then[key] if then is not None else None
        changed = f"{now / value - 1:+.1%}" if value else "-"
        rows.append([name, form(now), form(value) if value is not None else "-", changed])
    return table(("a step", "predicted", "in the plan", "of that"), rows)
