"""Holds the step times that are predicted from shapes and a calibration against steps that ran.

The runs are made in parts of some minutes, each between two calibrations, and predicted from the
one before it, as a user's would be. Where the machine was another one after a part than before, the
part is made once more. With `--keep` parts lie in a file as they are made, and one that was cut off
goes on from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
from benchmarks.record import Record, add_record_arguments, commit, positive, table, write_record
from benchmarks.spill_directory import spill_directory
from benchmarks.worker import number
from examples.heap import keep_freed_memory
from offload.calibrate import calibrate
from perfmodel.machine import Machine, read_machine
from perfmodel.plain_models import PLAIN_MODELS, plain_model
from perfmodel.prediction import predict
from perfmodel.workload import Strategy, Workload

MEDIAN_GOAL, WORST_GOAL = 0.06, 0.15
MOST_DRIFT, MOST_PARTS = 0.1, 3
"""Where the machine is by more than that another one after a part than before, its calibration says
nothing about it, and the part is made again, so many times in all."""
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
    add("--part", type=positive, default=7, metavar="N", help="runs between two calibrations (7)")
    add("--keep", type=Path, metavar="FILE", help="of parts that were made, so as to go on")
    add("--machine", metavar="FILE", help="what was calibrated before; without, it is now")
    arguments = parser.parse_args()
    if arguments.keep is not None and not arguments.keep.absolute().parent.is_dir():
        parser.error(f"--keep {arguments.keep} lies in no directory that is there; make it first")
    return arguments, parser


@dataclass(frozen=True)
class Part:
    """Some runs, between two calibrations."""

    samples: dict[str, tuple[Measured, float]]
    """By the run's name, what was measured and predicted, in seconds."""
    drift: dict[str, float]
    """By what part the machine was faster after them than before."""

    def as_json(self) -> dict[str, Any]:
        """Return what `of_json` takes."""
        samples = {name: (asdict(seen), said) for name, (seen, said) in self.samples.items()}
        return {"samples": samples, "drift": self.drift}

    @classmethod
    def of_json(cls, value: Any) -> Part:
        """Return what `as_json` was called on."""
        pairs = value["samples"].items()
        samples = {name: (Measured(**seen), said) for name, (seen, said) in pairs}
        return cls(samples, value["drift"])

    @property
    def worst_drift(self) -> float:
        """Return the largest change, without its sign."""
        return max(map(abs, self.drift.values()))


def part_of(
    runs: Sequence[Run], before: Machine, arguments: argparse.Namespace, directory: str, bar: Any
) -> tuple[Part, Machine]:
    """Make some runs, again where the machine changed, and return the steadiest and its last state.

    With `--machine` nothing is calibrated, and nothing said about a change.
    """
    tries: list[Part] = []
    while len(tries) < MOST_PARTS and all(each.worst_drift > MOST_DRIFT for each in tries):
        samples = {}
        for run in runs:
            training = replace(training_of(run, directory), schedule="auto")
            seen = measured(run, training, before, arguments.steps, arguments.warm_up)
            samples[run.name] = seen, predicted_s(run, training, before)
            bar.update(not tries)
        after = before if arguments.machine else calibrate(directory)
        tries.append(Part(samples, drift(before, after)))
        before = after
        if tries[-1].worst_drift > MOST_DRIFT:
            bar.write(f"the machine changed: {tries[-1].drift}")
    return min(tries, key=lambda each: each.worst_drift), before


def kept_parts(keep: Path | None, asked: dict[str, Any]) -> list[Part]:
    """Return what lies in the file of `--keep`. Raises ValueError for what is of other runs."""
    if keep is None or not keep.exists():
        return []
    try:
        found = json.loads(keep.read_text(encoding="utf-8"))
        of, parts = found["asked"], [Part.of_json(each) for each in found["parts"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{keep} holds no parts of a run ({error}): name another file") from None
    if of != asked:
        raise ValueError(f"{keep} is of {of}, and these are {asked}: name another file")
    return parts


def made_parts(runs: Sequence[Run], arguments: argparse.Namespace, directory: str) -> list[Part]:
    """Make all parts that do not lie in the file of `--keep` yet. Raises ValueError for another's.

    They lie there as soon as they are made, but for those in which the machine changed.
    """
    keep: Path | None = arguments.keep
    asked = {"commit": commit(), "steps": arguments.steps, "warm_up": arguments.warm_up}
    asked["runs"] = [run.name for run in runs]
    parts = kept_parts(keep, asked)
    done = {name for part in parts for name in part.samples}
    rest = [run for run in runs if run.name not in done]
    if not rest:
        return parts
    machine = read_machine(arguments.machine) if arguments.machine else calibrate(directory)
    with tqdm(total=len(runs), initial=len(done), desc="runs") as bar:
        for begin in range(0, len(rest), arguments.part):
            some = rest[begin : begin + arguments.part]
            part, machine = part_of(some, machine, arguments, directory, bar)
            parts.append(part)
            if keep is not None:
                steady = [each.as_json() for each in parts if each.worst_drift <= MOST_DRIFT]
                half = keep.with_name(f"{keep.name}.half")  # until all of it is there
                half.write_text(json.dumps({"asked": asked, "parts": steady}), encoding="utf-8")
                half.replace(keep)
    return parts


def make_record(parts: Sequence[Part]) -> Record:
    """Put what was measured and predicted of each run together, and how the machine changed."""
    samples = {name: sample for part in parts for name, sample in part.samples.items()}
    errors = [abs(said / seen.steady_s - 1) for seen, said in samples.values()]
    raw = [abs(said / seen.as_it_was_s - 1) for seen, said in samples.values()]
    claims = [
        claim_of("median error", errors, MEDIAN_GOAL, worst=False),
        claim_of("worst error", errors, WORST_GOAL, worst=True),
    ]
    drifted = [part.drift for part in parts]
    if any(part.worst_drift > MOST_DRIFT for part in parts):
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
            "drift in each part": drifted,
            "median error without dividing drift out": statistics.median(raw),
            "as measured": {name: seen.as_it_was_s for name, (seen, _) in samples.items()},
            "speed varied by": {name: seen.varied for name, (seen, _) in samples.items()},
        },
    )


def main() -> None:
    """Measure and record; exits with 0 whether the goal is met or not."""
    arguments, parser = parsed()
    keep_freed_memory()  # as workers do, so that all take their tensors from the same memory
    runs = runs_of(arguments.models, SIZES[: arguments.sizes])
    with ExitStack() as stack:
        directory = stack.enter_context(spill_directory(arguments.offload_path, parser))
        try:
            parts = made_parts(runs, arguments, directory)
        except ValueError as error:
            parser.error(str(error))
    rows = [
        [
            name,
            f"{1e3 * seen.steady_s:.0f}",
            f"{1e3 * said:.0f}",
            f"{said / seen.steady_s - 1:+.1%}",
        ]
        for part in parts
        for name, (seen, said) in part.samples.items()
    ]
    print(table(["run", "measured ms", "predicted", "error"], rows), end="\n\n")
    write_record(make_record(parts), arguments.json)


def drift(before: Machine, after: Machine) -> dict[str, float]:
    """Return by what part the machine was faster in one calibration than in another before it."""
    one, other = (each.device.matmul_flops_per_s[DTYPE].rates for each in (before, after))
    changes = {
        "matmul": statistics.median(b / a - 1 for a, b in zip(one, other, strict=True)),
        "memory": after.device.memory_bytes_per_s.at(8e6) / before.device.memory_bytes_per_s.at(8e6)
        - 1,
    }
    return {name: round(change, 4) for name, change in changes.items()}


if __name__ == "__main__":
    main()
