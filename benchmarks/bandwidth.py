"""Holds the drive to parts of the bandwidth that full overlap needs: step time and peak memory.

A step in which all of its activations travel needs them written in half of its time and read in the
other half. Each mode gets a part of that bandwidth; the schedule has to keep what does not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.activations import (
    NUM_DIGESTS,
    Samples,
    add_training_arguments,
    measure,
    mode_table,
    parse_training,
    peak_claim,
    peaks_of,
    ratio_to_both_nones,
    require_same_numbers,
    step_ratio,
    training_of,
)
from benchmarks.activations_worker import Training, open_worker
from benchmarks.record import Claim, Record, add_record_arguments, write_record
from benchmarks.spill_directory import spill_directory
from benchmarks.worker import number

PARTS = (0.25, 0.5, 1.0)
TIME_GOAL = 1.05
PROBE_STEPS = 4  # the first two are not like the rest
MIB = 1 << 20


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=4)
    add_training_arguments(parser)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw a PNG")
    return parse_training(parser), parser


def needed_bytes_per_s(training: Training) -> float:
    """Return all of a step's activations over half of its time, both as measured here."""
    with open_worker("none", "none", training) as worker:
        steps = [number(worker.ask("step"), "step_s") for _ in range(PROBE_STEPS)]
    with open_worker("all", "ssd", dataclasses.replace(training, schedule="all")) as worker:
        offloaded_bytes = number(worker.ask("peak"), "offloaded_bytes")
    return 2 * offloaded_bytes / statistics.median(steps[2:])


def mode_of(part: float) -> str:
    """Return the name of the mode with this part of the bandwidth."""
    return f"{part:.0%}"


def make_record(
    training: Training,
    needed: float,
    samples: Samples,
    answers: Mapping[str, Mapping[str, object]],
) -> Record:
    """Put the samples, the claims and the ratios together."""
    peaks = peaks_of(answers)
    times = {part: ratio_to_both_nones(samples, mode_of(part)) for part in PARTS}
    claims = [
        Claim(
            name=f"step time, {mode_of(part)} / none",
            sense="at most",
            goal=TIME_GOAL,
            interval=times[part],
        )
        for part in PARTS
    ]
    for less, more in pairwise(PARTS):
        claims.append(peak_claim(peaks, mode_of(more), mode_of(less), 1.0))
    worst = max(interval.median for interval in times.values())
    return Record(
        claim="a slow drive costs memory and no time",
        goal=f"step time <= {TIME_GOAL} of none at each bandwidth; peak falls as bandwidth grows",
        claims=claims,
        value=worst,
        floor=worst,
        peers={
            f"{what}, {mode_of(part)} / none": ratio
            for part in PARTS
            for what, ratio in (
                ("step time", times[part].median),
                ("peak", peaks[mode_of(part)] / peaks["none"]),
            )
        },
        noise={"step time, none again / none": step_ratio(samples, "none again", "none")},
        samples={**samples, "peak_bytes": peaks, "peaks": dict(answers)},
        settings={
            **{key: value for key, value in asdict(training).items() if key != "directory"},
            "needed_bytes_per_s": needed,
        },
        facts={},
    )


def draw(path: Path, peaks: Mapping[str, float], samples: Samples) -> None:
    """Draw peak memory and step time over bandwidth, both as parts of training without offload."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    parts = [100 * part for part in PARTS]
    shares = [100 * peaks[mode_of(part)] / peaks["none"] for part in PARTS]
    times = [ratio_to_both_nones(samples, mode_of(part)) for part in PARTS]
    medians = [interval.median for interval in times]
    spread = [
        [interval.median - interval.low for interval in times],
        [interval.high - interval.median for interval in times],
    ]
    left.plot(parts, shares, "o-", color="tab:blue")
    right.errorbar(parts, medians, yerr=spread, fmt="s--", color="tab:orange", capsize=4)
    left.set_xlabel("bandwidth, % of what full overlap needs")
    left.set_ylabel("peak activation memory, % of no offload", color="tab:blue")
    right.set_ylabel("step time / no offload (95 % interval)", color="tab:orange")
    left.set_ylim(0, 105)
    left.set_xticks(parts)
    right.set_ylim(0.8, 1.2)
    right.axhline(TIME_GOAL, color="tab:orange", linewidth=0.5)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure and record; exits with 0 whether the goal is met or not."""
    arguments, parser = parse_arguments()
    with ExitStack() as stack:
        directory = stack.enter_context(spill_directory(arguments.offload_path, parser))
        training = training_of(arguments, directory)
        needed = needed_bytes_per_s(training)
        workers = {
            name: stack.enter_context(open_worker(name, "none", training))
            for name in ("none", "none again")
        }
        for part in PARTS:
            held = dataclasses.replace(training, bytes_per_s=part * needed)
            name = mode_of(part)
            workers[name] = stack.enter_context(open_worker(name, "ssd", held))
        for _ in tqdm(range(NUM_DIGESTS), desc="comparing bits"):
            require_same_numbers(workers)
        samples = measure(workers, warm_up=arguments.warm_up, pairs=arguments.pairs)
        answers = {name: worker.ask("peak") for name, worker in workers.items()}
        require_same_numbers(workers)
    print(f"full overlap needs {needed / 1e6:.0f} MB/s", end="\n\n")
    print(mode_table(samples, peaks_of(answers)), end="\n\n")
    if arguments.picture is not None:
        draw(arguments.picture, peaks_of(answers), samples)
    write_record(make_record(training, needed, samples, answers), arguments.json)


if __name__ == "__main__":
    main()
