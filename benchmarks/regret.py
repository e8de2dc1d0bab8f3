"""Runs every strategy of a grid under limits, and the planner's choice against the best of them."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.activations_worker import Training
from benchmarks.plan_worker import open_planned
from benchmarks.record import (
    Claim,
    Interval,
    Record,
    add_record_arguments,
    median_interval,
    positive,
    table,
    write_record,
)
from benchmarks.spill_directory import spill_directory
from benchmarks.worker import Worker, number
from examples.heap import keep_freed_memory
from offload.calibrate import calibrate
from offload.config import Limits, Plan
from perfmodel.machine import Machine, read_machine
from perfmodel.plain_models import plain_model
from perfmodel.planner import Search, plan
from perfmodel.prediction import predict
from perfmodel.workload import Strategy, Workload

MIB = 1 << 20
GOAL = 1.03
LIMITS = (0.8, 0.55)
"""Of what the model needs in all with everything kept and torch's optimizer."""
BEST = 3  # of the grid, that are measured again beside the choice
AGAIN = "the best again"


class Size(NamedTuple):
    """A model to plan for."""

    model: str
    layers: int
    hidden: int
    heads: int
    seq_len: int
    batch: int


SIZES = (
    Size("gpt", 6, 512, 8, 256, 8),
    Size("llama", 4, 512, 8, 256, 8),
    Size("bert", 6, 384, 6, 512, 4),
    Size("t5", 3, 384, 6, 512, 8),
    Size("gpt", 3, 768, 12, 512, 4),
)


@dataclass(frozen=True)
class Measured:
    """What a strategy took."""

    strategy: str
    plan: Plan
    step_s: float
    total_bytes: float
    """All that was in memory at the worst moment."""


def title_of(size: Size) -> str:
    """Return what a model is called in the record."""
    return f"{size.model} {'x'.join(map(str, size[1:]))}"


def training_of(size: Size, directory: str) -> Training:
    """Return what a worker trains."""
    return Training(
        model=size.model,
        layers=size.layers,
        hidden=size.hidden,
        heads=size.heads,
        seq_len=size.seq_len,
        micro_batch=size.batch,
        vocab=256,
        dropout=0.0,
        optimizer="adamw",
        threads=2,
        directory=directory,
        staging_bytes=48 * MIB,
        min_tensor_bytes=MIB,
        io_engine="auto",
        verify=True,
    )


def workload_of(size: Size) -> Workload:
    """Return the same as the planner takes it."""
    model = plain_model(
        size.model,
        num_layers=size.layers,
        hidden_size=size.hidden,
        num_heads=size.heads,
        seq_len=size.seq_len,
    )
    return Workload(
        model=model,
        seq_len=size.seq_len,
        micro_batch=size.batch,
        dtype="float32",
        plain=size.model,
    )


def grid_of(size: Size, kept_bytes: int) -> list[tuple[Workload, Strategy]]:
    """Return every strategy that is run, whatever a planner thinks of it."""
    whole = workload_of(size)
    layers = size.layers * (2 if size.model == "t5" else 1)
    moved = Strategy(activations="ssd", optimizer="torch", staging_bytes=64 * MIB)
    activations = (
        Strategy(optimizer="torch"),
        Strategy(activations="recompute", optimizer="torch"),
        *(
            Strategy(activations="recompute", recompute=tuple(range(some)), optimizer="torch")
            for some in sorted({max(layers // 4, 1), layers // 2, layers - 1})
        ),
        moved,
        replace(moved, memory_bytes=kept_bytes // 2 + 64 * MIB),
    )
    found = [(whole, each) for each in activations]
    found += [(whole, replace(each, optimizer="offload", placement="ssd")) for each in activations]
    halves = whole.with_batch(size.batch // 2)
    return found + [(halves, each) for each in (*activations[:2], moved)]


def named(workload: Workload, strategy: Strategy) -> str:
    """Return what a strategy is called in the table."""
    some = "" if strategy.recompute is None else f" {len(strategy.recompute)}"
    limit = "" if strategy.memory_bytes is None else f" {strategy.memory_bytes / MIB:.0f} MiB"
    batch = f"{workload.micro_batch} x {workload.accumulation}"
    states = strategy.placement if strategy.optimizer == "offload" else "torch"
    return f"{strategy.activations}{some}{limit}, {states}, {batch}"


def measure(
    name: str, training: Training, planned: Plan, steps: int, warm_up: int
) -> tuple[float, float]:
    """Return the median step of a plan and its bytes at the worst moment, in its own process."""
    with open_planned(name, training, planned) as worker:
        seconds = [number(worker.ask("step"), "step_s") for _ in range(warm_up + steps)]
        answer = worker.ask("peak")
    keys = ("resting_bytes", "torch_peak_bytes", "native_peak_bytes", "page_cache_bytes")
    return statistics.median(seconds[warm_up:]), sum(number(answer, key) for key in keys)


def grid_measured(
    size: Size, machine: Machine, directory: str, arguments: argparse.Namespace
) -> list[Measured]:
    """Run the grid, or take what each strategy took before."""
    before: dict[str, tuple[float, float]] = {}
    if arguments.grids is not None:
        grids = json.loads(arguments.grids.read_text(encoding="utf-8"))["samples"]["grids"]
        before = {name: (step_s, nbytes) for name, step_s, nbytes in grids[title_of(size)]}
    kept = predict(workload_of(size), Strategy(optimizer="torch"), machine, effort=0.0)
    training, found = training_of(size, directory), []
    cases = grid_of(size, kept.device_bytes // 2)
    for workload, strategy in tqdm(cases, desc=f"grid of {size.model}", leave=False):
        planned = Plan.of(workload, strategy, path=(directory,))
        name = named(workload, strategy)
        step_s, nbytes = before.get(name) or measure(
            name, training, planned, arguments.steps, arguments.warm_up
        )
        found.append(Measured(name, planned, step_s, nbytes))
    return found


def chosen_for(size: Size, machine: Machine, limit: int, directory: str) -> tuple[str, Plan] | None:
    """Return the planner's first plan; None where it says that nothing fits."""
    whole = workload_of(size)
    batches = (size.batch, size.batch // 2)
    found = plan(whole, machine, Limits(device_bytes=limit), Search(micro_batches=batches)).choices
    if not found:
        return None
    best = found[0].prediction
    planned = Plan.of(best.workload, best.strategy, path=(directory,))
    return named(best.workload, best.strategy), planned


def in_turns(
    training: Training, plans: Mapping[str, Plan], rounds: int, warm_up: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return each one's steps, measured in turns, and their bytes at the worst moment."""
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {
            name: stack.enter_context(open_planned(name, training, each))
            for name, each in plans.items()
        }
        for turn in range(warm_up + rounds):
            for name, worker in workers.items():
                step_s = number(worker.ask("step"), "step_s")
                if turn >= warm_up:
                    seconds[name].append(step_s)
        keys = ("resting_bytes", "torch_peak_bytes", "native_peak_bytes", "page_cache_bytes")
        answers = {name: worker.ask("peak") for name, worker in workers.items()}
    nbytes = {name: sum(number(each, key) for key in keys) for name, each in answers.items()}
    return seconds, nbytes


def regret(
    size: Size,
    limit: int,
    grid: list[Measured],
    machine: Machine,
    directory: str,
    arguments: argparse.Namespace,
) -> dict[str, object]:
    """Return how the choice compares with the best of the grid that fit."""
    fitting = sorted(
        (each for each in grid if each.total_bytes <= limit), key=lambda each: each.step_s
    )
    choice = chosen_for(size, machine, limit, directory)
    found: dict[str, object] = {"limit_bytes": limit, "fitting": len(fitting)}
    if choice is None or not fitting:
        return found | {"choice": choice and choice[0], "met": choice is None and not fitting}
    name, planned = choice
    plans = {f"choice: {name}": planned}
    plans |= {each.strategy: each.plan for each in fitting[:BEST]}
    plans[AGAIN] = fitting[0].plan
    seconds, nbytes = in_turns(
        training_of(size, directory), plans, arguments.pairs, arguments.warm_up
    )
    others = [each.strategy for each in fitting[:BEST]]
    best = min(others, key=lambda other: statistics.median(seconds[other]))
    mine = seconds[f"choice: {name}"]
    ratios = [a / b for a, b in zip(mine, seconds[best], strict=True)]
    noise = [a / b for a, b in zip(seconds[AGAIN], seconds[fitting[0].strategy], strict=True)]
    return found | {
        "choice": name,
        "best": best,
        "ratios": ratios,
        "noise": noise,
        "choice_bytes": nbytes[f"choice: {name}"],
        "fits": nbytes[f"choice: {name}"] <= limit,
    }


def parsed() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=4)
    add = parser.add_argument
    add("--offload-path", type=Path, metavar="DIR", help="on the drive to use (build/spill)")
    add("--sizes", type=positive, default=len(SIZES), metavar="N", help="the first N (all)")
    add("--steps", type=positive, default=4, help="of each strategy of the grid (4)")
    add("--grids", type=Path, metavar="FILE", help="a record whose grids are taken, not run again")
    add("--machine", metavar="FILE", help="what was calibrated before; without, it is now")
    return parser.parse_args(), parser


def make_record(problems: Mapping[str, Mapping[str, object]], grids: object) -> Record:
    """Put the claims together: each choice against the best, and that all fit."""
    compared = {
        name: median_interval(each["ratios"])  # type: ignore[arg-type]
        for name, each in problems.items()
        if "ratios" in each
    }
    claims = [
        Claim(name=f"{name}: choice / best", sense="at most", goal=GOAL, interval=interval)
        for name, interval in compared.items()
    ]
    misfits = sum(not each.get("fits", each.get("met")) for each in problems.values())
    exactly = Interval(median=misfits, low=misfits, high=misfits, coverage=1.0, count=len(problems))
    claims.append(Claim(name="choices that do not fit", sense="at most", goal=0, interval=exactly))
    noise = {
        name: median_interval(each["noise"])  # type: ignore[arg-type]
        for name, each in problems.items()
        if "noise" in each
    }
    return Record(
        claim="the planner's first choice is as fast as the best that fits",
        goal=f"step time <= {GOAL} of the best of a grid under each limit, and it fits",
        claims=claims,
        value=max((interval.median for interval in compared.values()), default=0.0),
        floor=None,
        peers={name: interval.median for name, interval in compared.items()},
        noise=noise,
        samples={"problems": problems, "grids": grids},
        settings={"sizes": SIZES, "limits": LIMITS},
        facts={},
    )


def main() -> None:
    """Measure and record; exits with 0 whether the goal is met or not."""
    arguments, parser = parsed()
    problems: dict[str, dict[str, object]] = {}
    grids: dict[str, list[tuple[str, float, float]]] = {}
    keep_freed_memory()  # as workers do, so that all take their tensors from the same memory
    with ExitStack() as stack:
        directory = stack.enter_context(spill_directory(arguments.offload_path, parser))
        machine = read_machine(arguments.machine) if arguments.machine else calibrate(directory)
        for size in tqdm(SIZES[: arguments.sizes], desc="models"):
            grid = grid_measured(size, machine, directory, arguments)
            title = title_of(size)
            grids[title] = [(each.strategy, each.step_s, each.total_bytes) for each in grid]
            for part in LIMITS:
                limit = int(part * grid[0].total_bytes)
                found = regret(size, limit, grid, machine, directory, arguments)
                problems[f"{title} in {limit / MIB:.0f} MiB"] = found
    rows = [
        [name, str(each.get("choice")), str(each.get("best")), str(each.get("fits"))]
        for name, each in problems.items()
    ]
    print(table(["problem", "choice", "best of the grid", "fits"], rows), end="\n\n")
    write_record(make_record(problems, grids), arguments.json)


if __name__ == "__main__":
    main()
