"""Holds the step times that are predicted from shapes and a calibration against steps that ran."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.activations_worker import PROBE_FLOPS, Training, open_worker
from benchmarks.predicted_memory import (
    MODES,
    SIZES,
    Run,
    claim_of,
    runs_of,
    training_of,
)
from benchmarks.record import Record, add_record_arguments, positive, table, write_record
from benchmarks.spill_directory import spill_directory
from benchmarks.worker import number
from examples.heap import keep_freed_memory
from offload.calibrate import calibrate
from perfmodel.machine import Machine, read_machine
from perfmodel.plain_models import PLAIN_MODELS, plain_model
from perfmodel.prediction import predict
from perfmodel.workload import Strategy, Workload

MEDIAN_GOAL, WORST_GOAL = 0.06, 0.15
MOST_DRIFT = 0.1
"""Where the machine is by more than that another one after the runs than before, its calibration
says nothing about them."""
STEADY, MOST_TRIES = 0.1, 3
"""A run during which the machine's speed varies by more is measured again, so many times in all;
what counts is the try in which it varied least."""
DTYPE = "float32"


def predicted_s(run: Run, training: Training, machine: Machine) -> float:
    """Return the predicted time of a step."""
    model = plain_model(
        run.model,
        num_layers=training.layers,
        hidden_size=training.hidden,
        num_heads=training.heads,
        seq_len=training.seq_len,
        vocab_size=training.vocab,
    )
    workload = Workload(
        model=model,
        seq_len=training.seq_len,
        micro_batch=training.micro_batch,
        dtype=DTYPE,
        plain=run.model,
    )
    strategy = Strategy(
        activations=run.mode,
        optimizer="offload" if run.placement else "torch",
        placement=run.placement or "device",
        staging_bytes=training.staging_bytes,
        min_tensor_bytes=training.min_tensor_bytes,
    )
    return predict(workload, strategy, machine).step_s


@dataclass(frozen=True)
class Measured:
    """The median step of a process of its own."""

    as_it_was_s: float
    steady_s: float
    """At the machine's calibrated speed."""
    varied: float
    """Between the quartiles, of the machine's speed meanwhile, as a part of it."""


def measured(run: Run, training: Training, machine: Machine, steps: int, warm_up: int) -> Measured:
    """Return what a step takes, from the try in which the machine was steadiest."""
    tries: list[Measured] = []
    while len(tries) < MOST_TRIES and all(each.varied > STEADY for each in tries):
        tries.append(tried(run, training, machine, steps, warm_up))
    return min(tries, key=lambda each: each.varied)


def tried(run: Run, training: Training, machine: Machine, steps: int, warm_up: int) -> Measured:
    """Return what a step takes.

    The machine is shared and slower at one time than at another: before and after each step a
    product of matrices is timed that was calibrated, and by what part it takes longer is divided
    out.
    """
    calibrated_s = PROBE_FLOPS / machine.device.matmul_flops_per_s[DTYPE].at(PROBE_FLOPS)
    seconds, slower = [], []
    with open_worker(run.mode, MODES[run.mode], training) as worker:
        for _ in range(warm_up + steps):
            slower.append(number(worker.ask("probe"), "probe_s") / calibrated_s)
            seconds.append(number(worker.ask("step"), "step_s"))
        slower.append(number(worker.ask("probe"), "probe_s") / calibrated_s)
    around = [(one + other) / 2 for one, other in itertools.pairwise(slower)]
    steady = [step_s / each for step_s, each in zip(seconds, around, strict=True)]
    low, middle, high = statistics.quantiles(slower[warm_up:], n=4)
    return Measured(
        as_it_was_s=statistics.median(seconds[warm_up:]),
        steady_s=statistics.median(steady[warm_up:]),
        varied=(high - low) / middle,
    )


def parsed() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=8)  # some first steps are planned for
    add = parser.add_argument
    add("--offload-path", type=Path, metavar="DIR", help="on the drive to use (build/spill)")
    add("--models", nargs="+", choices=PLAIN_MODELS, default=PLAIN_MODELS, help="(all)")
    add("--sizes", type=positive, default=len(SIZES), metavar="N", help="the first N (all)")
    add("--steps", type=positive, default=8, help="of each run that are timed (8)")
    add("--machine", metavar="FILE", help="what was calibrated before; without, it is now")
    return parser.parse_args(), parser


def make_record(
    samples: Mapping[str, tuple[Measured, float]], drifted: Mapping[str, float]
) -> Record:
    """Put what was measured and predicted of each run together, and how the machine changed."""
    errors = [abs(said / seen.steady_s - 1) for seen, said in samples.values()]
    raw = [abs(said / seen.as_it_was_s - 1) for seen, said in samples.values()]
    claims = [
        claim_of("median error", errors, MEDIAN_GOAL, worst=False),
        claim_of("worst error", errors, WORST_GOAL, worst=True),
    ]
    if any(abs(change) > MOST_DRIFT for change in drifted.values()):
        why = f"the machine changed while it was measured: {drifted}"
        claims = [replace(claim, interval=None, reason=why) for claim in claims]
    return Record(
        claim=f"the step time of {len(samples)} runs is predicted from shapes and a calibration",
        goal=f"median error <= {MEDIAN_GOAL}, worst <= {WORST_GOAL}",
        claims=claims,
        value=statistics.median(errors),
        floor=None,
        peers={},
        noise={},
        samples={name: {"step": (seen.steady_s, said)} for name, (seen, said) in samples.items()},
        settings={"sizes": SIZES, "modes": list(MODES), "s": "measured, predicted"},
        facts={
            "drift": drifted,
            "median error without dividing drift out": statistics.median(raw),
            "as measured": {name: seen.as_it_was_s for name, (seen, _) in samples.items()},
            "speed varied by": {name: seen.varied for name, (seen, _) in samples.items()},
        },
    )


def main() -> None:
    """Measure and record; exits with 0 whether the goal is met or not."""
    arguments, parser = parsed()
    samples: dict[str, tuple[Measured, float]] = {}
    keep_freed_memory()  # as workers do, so that all take their tensors from the same memory
    with ExitStack() as stack:
        directory = stack.enter_context(spill_directory(arguments.offload_path, parser))
        before = read_machine(arguments.machine) if arguments.machine else calibrate(directory)
        for run in tqdm(runs_of(arguments.models, SIZES[: arguments.sizes]), desc="runs"):
            training = replace(training_of(run, directory), schedule="auto")
            seen = measured(run, training, before, arguments.steps, arguments.warm_up)
            samples[run.name] = seen, predicted_s(run, training, before)
        after = before if arguments.machine else calibrate(directory)
    rows = [
        [
            name,
            f"{1e3 * seen.steady_s:.0f}",
            f"{1e3 * said:.0f}",
            f"{said / seen.steady_s - 1:+.1%}",
        ]
        for name, (seen, said) in samples.items()
    ]
    print(table(["run", "measured ms", "predicted", "error"], rows), end="\n\n")
    write_record(make_record(samples, drift(before, after)), arguments.json)


def drift(before: Machine, after: Machine) -> dict[str, float]:
    """Return by what part the machine was faster after all runs than before."""
    one, other = (each.device.matmul_flops_per_s[DTYPE].rates for each in (before, after))
    changes = {
        "matmul": statistics.median(b / a - 1 for a, b in zip(one, other, strict=True)),
        "memory": after.device.memory_bytes_per_s.at(8e6) / before.device.memory_bytes_per_s.at(8e6)
        - 1,
    }
    return {name: round(change, 4) for name, change in changes.items()}


if __name__ == "__main__":
    main()
