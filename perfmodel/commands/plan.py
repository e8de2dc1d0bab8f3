"""`perfmodel plan`: the strategies that fit, the best of them in detail, and its plan as a file."""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from perfmodel.chosen_plan import plan_of
from perfmodel.commands.arguments import (
    Parser,
    add_batch,
    add_limits,
    add_machine,
    add_model,
    add_ranks,
    listed,
    one_of,
    whole,
)
from perfmodel.commands.asked import Asked, asked
from perfmodel.commands.described import (
    NOTHING_FITS,
    choices_table,
    details,
    heading,
    nothing_fits,
    prediction_json,
)
from perfmodel.commands.sweep import run_sweep
from perfmodel.commands.tables import ascii_line, digits, json_text
from perfmodel.emit import (
    emit_deepspeed,
    emit_transformers,
    require_of_deepspeed,
    require_of_transformers,
)
from perfmodel.emit_megatron import emit_megatron, require_of_megatron
from perfmodel.plan import TIERS
from perfmodel.plan_file import Plan
from perfmodel.planner import Found, Search, plan
from perfmodel.prediction import Prediction
from perfmodel.workload import ACTIVATIONS, Strategy, Workload

__all__ = ["NOTHING_FITS", "add_arguments", "run"]

# A model's description has no figures that change neither memory nor time.
_NOT_EMITTED = (
    "--rotary-base, --norm-epsilon, data, learning rate and initial values are the model's own; "
    "add them"
)
_NOT_MEGATRONS = (
    "these flags move nothing; what is to leave the device is in the plan that -o writes: give it "
    "to wrap_model and build_optimizer of offload.integrations.megatron (docs/megatron.md)"
)
_NOT_THE_TRAINERS = (
    "these alone do not fit: activations and states move by OffloadTrainer(..., plan=), with the "
    "plan that -o writes, of a model whose parameters have the plan's dtype"
)
EMITTED = ("deepspeed", "megatron", "transformers")


def add_arguments(parser: Parser) -> None:
    """Add what a plan is asked for with."""
    add_machine(parser)
    add_model(parser)
    add_batch(parser)
    add_ranks(parser)
    add_limits(parser)
    _add_search(parser)
    add = parser.add_argument_group("what comes of it").add_argument
    add("--path", nargs="+", default=[], metavar="DIR", help="directories on the SSD, for the plan")
    add(
        "-o", "--output", metavar="FILE", help="write the best plan, or with --sweep a chart (.svg)"
    )
    add("--json", action="store_true", help="print all as JSON")
    add(
        "--emit",
        type=one_of(*EMITTED),
        help=f"print the best as a framework takes it: {', '.join(EMITTED)}",
    )
    add(
        "--sweep",
        metavar="KEY=LOW:HIGH",
        help="what fits for each of LOW, twice that and so on; KEY is seq-len or micro-batch",
    )


def _add_search(parser: Parser) -> None:
    add = parser.add_argument_group("what may be chosen (several with commas)").add_argument
    add("--activations", type=listed(one_of(*ACTIVATIONS)), help=", ".join(ACTIVATIONS))
    add("--optimizer", type=listed(one_of("offload", "torch")), help="offload, torch")
    add("--placement", type=listed(one_of(*TIERS)), help=f"of offload's states: {', '.join(TIERS)}")
    add("--keep-micro-batch", action="store_true", help="no other micro-batch than the given one")
    add("--zero-stages", type=listed(whole), metavar="N,N", help="0 to 3, for --zero-stage")
    add("--pipelines", type=listed(whole), metavar="N,N", help="stages, for --pipeline")


def run(arguments: argparse.Namespace) -> int:
    """Search and print. Raises ValueError and OSError for what cannot be used."""
    if arguments.emit in ("deepspeed", "megatron"):
        chosen = arguments.framework or arguments.emit
        if chosen != arguments.emit:
            raise ValueError(f"--emit {arguments.emit} does not go with --framework {chosen}")
        arguments.framework = chosen
    if arguments.emit and arguments.json:
        raise ValueError("--emit and --json are two things to print; give one of them")
    if arguments.sweep is not None:
        return run_sweep(arguments, search_of)
    if arguments.output is not None and arguments.output.endswith(".svg"):
        raise ValueError(f"-o {arguments.output} is a chart's name, which is of a --sweep")
    wanted = asked(arguments)
    search = search_of(arguments, wanted)
    found = plan(wanted.workload, wanted.used_machine, wanted.limits, search)
    if arguments.json:
        print(json_text(_json(found, wanted)))
    if not found.choices:
        return _none(found, only_said=bool(arguments.json or arguments.emit))
    best = found.choices[0].prediction
    emitted = emission(arguments.emit, best, wanted, arguments) if arguments.emit else None
    if arguments.output is not None:
        text = json_text(written_plan(best, wanted, arguments.path).to_json())
        Path(arguments.output).write_text(text + "\n", encoding="utf-8")
    if emitted is not None:
        print(emitted)
        _note(arguments.emit, best)
    elif not arguments.json:
        ranks = arguments.zero_stages is not None or arguments.pipelines is not None
        print("\n".join(_lines(found, wanted, ranks=ranks)))
    return 0


def _none(found: Found, *, only_said: bool) -> int:
    """Say that nothing fits, and show what comes closest."""
    print(f"perfmodel: {nothing_fits(found)}", file=sys.stderr)
    if found.closest is not None and not only_said:
        print("\n".join(["the closest, which does not fit:", "", *details(found.closest)]))
    return NOTHING_FITS


def search_of(arguments: argparse.Namespace, wanted: Asked) -> Search:
    """Return what may be chosen. Raises ValueError for a tier that the machine does not have."""
    chosen: dict[str, Any] = {
        "activations": arguments.activations,
        "optimizers": arguments.optimizer,
        "placements": arguments.placement,
        "zero_stages": arguments.zero_stages,
        "pipelines": arguments.pipelines,
    }
    chosen = {key: value for key, value in chosen.items() if value is not None}
    if arguments.keep_micro_batch:
        chosen["micro_batches"] = (wanted.workload.micro_batch,)
    if arguments.emit:
        chosen["refusal"] = partial(refusal, arguments.emit)
    _require_ranks(arguments)
    if wanted.workload.plain and max(arguments.pipelines or (1,)) > 1:
        raise ValueError(
            f"--pipelines: ranks of {wanted.workload.plain}, which is examples/train_gpt.py's, "
            "share data alone; give a config.json instead"
        )
    machine = wanted.machine
    for flag, values in (
        ("--activations", arguments.activations or ()),
        ("--placement", arguments.placement or ()),
        ("--path", ("ssd",) if arguments.path else ()),
        ("--ssd-space", ("ssd",) if arguments.ssd_space is not None else ()),
        ("--ssd-write-bytes-per-day", ("ssd",) if arguments.ssd_write_bytes_per_day else ()),
    ):
        if "ssd" in values and machine.drive is None:
            raise ValueError(f"{flag} asks for an SSD, and {machine.name} has no drive")
    if arguments.optimizer == ("torch",) and arguments.placement:
        raise ValueError("--placement is of offload's states; torch's are where the parameters are")
    if arguments.optimizer == ("torch",) and wanted.workload.dtype != "float32":
        raise ValueError(
            f"--optimizer torch is for --dtype float32, not {wanted.workload.dtype}: it has no "
            "master copies"
        )
    for flag, values in (
        ("--activations", arguments.activations),
        ("--placement", arguments.placement),
    ):
        if machine.link is None and values == ("host",):
            raise ValueError(f"{flag} host: the device's memory is the host's on {machine.name}")
    return Search(**chosen)


def _require_ranks(arguments: argparse.Namespace) -> None:
    """Raise ValueError for stages that there are not."""
    for stage in arguments.zero_stages or ():
        if stage > 3:
            raise ValueError(f"--zero-stages {stage} is not 0, 1, 2 or 3")
    if 0 in (arguments.pipelines or ()):
        raise ValueError("--pipelines 0 is not at least 1")
    for one, several in (("zero_stage", "zero_stages"), ("pipeline", "pipelines")):
        given, tried = getattr(arguments, one), getattr(arguments, several)
        if given is not None and tried is not None:
            names = f"--{one.replace('_', '-')} and --{several.replace('_', '-')}"
            raise ValueError(f"{names} say the same; give one of them")


def _note(kind: str, best: Prediction) -> None:
    """Say what to expect, and what a framework's own settings leave open."""
    said = f"{digits(best.step_s)} s a step; {best.bottleneck}"
    print(f"perfmodel: note: predicted are {said}", file=sys.stderr)
    strategy = best.strategy
    moves = strategy.activations in ("host", "ssd") or set(strategy.shares) != {"device"}
    if kind == "megatron":
        print(f"perfmodel: note: {_NOT_EMITTED}", file=sys.stderr)
        if moves:
            print(f"perfmodel: note: {_NOT_MEGATRONS}", file=sys.stderr)
    elif kind == "transformers" and moves:
        print(f"perfmodel: note: {_NOT_THE_TRAINERS}", file=sys.stderr)


def refusal(kind: str, workload: Workload, strategy: Strategy) -> str:
    """Return why a framework cannot be told of a strategy; nothing where it can."""
    require = {
        "deepspeed": require_of_deepspeed,
        "megatron": require_of_megatron,
        "transformers": require_of_transformers,
    }[kind]
    try:
        require(workload, strategy)
    except ValueError as error:
        return str(error)
    return ""


def written_plan(prediction: Prediction, wanted: Asked, path: list[str]) -> Plan:
    """Return the plan to be written. Raises ValueError where its SSD has no directory."""
    strategy, drive = prediction.strategy, wanted.machine.drive
    directories = tuple(path) or ((drive.path,) if drive is not None and drive.path else ())
    if not directories and (strategy.activations == "ssd" or "ssd" in strategy.shares):
        raise ValueError("--path is missing: the best plan uses the SSD, in directories there")
    return plan_of(prediction, wanted.machine, path=directories, limits=wanted.limits)


def emission(kind: str, best: Prediction, wanted: Asked, arguments: argparse.Namespace) -> str:
    """Return a framework's configuration. Raises ValueError where it cannot be told."""
    workload, strategy = best.workload, best.strategy
    if kind == "deepspeed":
        made = written_plan(best, wanted, arguments.path)
        return json_text(emit_deepspeed(workload, strategy, made))
    if kind == "transformers":
        return json_text(emit_transformers(workload, strategy))
    return shlex.join(emit_megatron(workload, strategy))


def _lines(found: Found, wanted: Asked, *, ranks: bool) -> list[str]:
    machine, best = wanted.used_machine, found.choices[0]
    return [
        heading(wanted.workload, wanted.machine),
        *map(ascii_line, wanted.notes),
        "",
        *choices_table(found, machine, ranks=ranks),
        "",
        ascii_line(f"{best.name}: {best.why}"),
        *_unmoved(best.prediction),
        ascii_line(f"{found.fitting} of {found.tried} strategies fit"),
        "",
        *details(best.prediction),
    ]


def _unmoved(best: Prediction) -> list[str]:
    """Return that a tier was named that nothing has to go to, if so."""
    tier = best.strategy.activations
    moved = any((each.name, each.tier) == ("activations", tier) for each in best.held)
    if tier not in ("host", "ssd") or moved:
        return []
    return [f"note: all activations have room on the device, and none has to go to the {tier}"]


def _json(found: Found, wanted: Asked) -> dict[str, Any]:
    machine = wanted.used_machine
    choices = [
        {
            "name": each.name,
            "why": each.why,
            **prediction_json(each.prediction, machine),
        }
        for each in found.choices
    ]
    closest = found.closest
    return {
        "workload": wanted.workload.to_json(),
        "machine": wanted.machine.name,
        "notes": list(wanted.notes),
        "tried": found.tried,
        "fitting": found.fitting,
        "choices": choices,
        "closest": prediction_json(closest, machine) if closest is not None else None,
        "over": dict(found.over) if found.over is not None else None,
        "change": found.change,
    }
