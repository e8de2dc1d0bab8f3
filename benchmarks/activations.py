"""Trains with activations in memory, recomputed, on the SSD, and as planned: step time and peak.

Every mode trains in a process of its own, one step at a time in turns, on the same windows; mode
none stands twice, for the noise. Losses and gradients are compared to the bit before anything is
timed and once more after it; peaks come from a step of their own that is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.activations_worker import Training, open_worker
from benchmarks.record import (
    Claim,
    Interval,
    Record,
    add_record_arguments,
    median_interval,
    paired_ratios,
    positive,
    quartiles_text,
    round_order,
    table,
    write_record,
)
from benchmarks.spill_directory import spill_directory
from benchmarks.worker import Worker, WorkerError, number
from examples.models import MODELS

MODES = {
    "none": "none",
    "ssd": "ssd",
    "auto": "auto",
    "recompute": "recompute",
    "none again": "none",
}
PEAK_GOAL = 0.20
TIME_GOALS = {"ssd": {"none": 1.03, "recompute": 0.88}, "auto": {"none": 1.02}}
NUM_DIGESTS = 2  # the first step of AdamW starts from nothing, the second from its state
MIB = 1 << 20

Samples = dict[str, dict[str, list[float]]]


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what describes the training."""
    parser.add_argument("--model", choices=tuple(MODELS), default="gpt", help="(gpt)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of channels (0)")
    parser.add_argument(
        "--optimizer",
        choices=("adamw", "sgd"),
        default="adamw",
        help="sgd holds no state, so that larger models fit in memory five times (adamw)",
    )
    for flag, default in (
        ("--layers", 8),
        ("--hidden", 1024),
        ("--heads", 16),
        ("--seq-len", 512),
        ("--micro-batch", 4),
        ("--vocab", 256),
        ("--threads", 2),
        ("--staging-bytes", 96 * MIB),
        ("--min-tensor-bytes", MIB),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"({default})")
    parser.add_argument("--io-engine", choices=("auto", "uring", "posix"), default="auto")
    parser.add_argument("--no-verify", action="store_true", help="without checksums")
    parser.add_argument(
        "--offload-path", type=Path, metavar="DIR", help="on the drive to use (build/spill)"
    )


def parse_training(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line; ends the program where the sizes do not fit together."""
    arguments = parser.parse_args()
    if arguments.hidden % arguments.heads:
        parser.error(f"--heads {arguments.heads} does not divide --hidden {arguments.hidden}")
    return arguments


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=6)
    add_training_arguments(parser)
    parser.add_argument(
        "--restarts",
        type=positive,
        default=1,
        metavar="N",
        help="how often all processes are started anew: where the memory of one lies alone makes a "
        "percent or two (1)",
    )
    return parse_training(parser), parser


def require_same_numbers(workers: Mapping[str, Worker]) -> None:
    """Let everyone take a step; raises WorkerError where loss or gradients differ in a bit."""
    digests = {name: worker.ask("digest") for name, worker in workers.items()}
    for name, digest in digests.items():
        for key, value in digest.items():
            if value != digests["none"][key]:
                raise WorkerError(f"{name}: {key} {value}, but in none {digests['none'][key]}")


def measure(workers: Mapping[str, Worker], *, warm_up: int, pairs: int) -> Samples:
    """Let everyone take steps in turns; returns the seconds of the timed ones."""
    samples: Samples = {name: {} for name in workers}
    for index in tqdm(range(warm_up + pairs), desc="rounds"):
        for name in round_order(list(workers), index):
            answer = workers[name].ask("step")
            if index >= warm_up:
                for key in answer:
                    samples[name].setdefault(key, []).append(number(answer, key))
    return samples


def peaks_of(answers: Mapping[str, Mapping[str, object]]) -> dict[str, float]:
    """Return each mode's worst moment above the process at rest in mode none, in bytes."""
    resting_bytes = number(answers["none"], "resting_bytes")
    return {
        name: number(answer, "resting_bytes")
        - resting_bytes
        + number(answer, "torch_peak_bytes")
        + number(answer, "native_peak_bytes")
        + number(answer, "page_cache_bytes")
        for name, answer in answers.items()
    }


def step_ratio(samples: Samples, name: str, other: str) -> Interval:
    """Return the paired ratio of two modes' step times."""
    return median_interval(paired_ratios(samples[name]["step_s"], samples[other]["step_s"]))


def ratio_to_both_nones(samples: Samples, name: str) -> Interval:
    """Return the paired ratio to the mean of the round's two steps without offload.

    Both are the same program, and one alone differs from the other by more than is to be shown.
    """
    once, again = (samples[mode]["step_s"] for mode in ("none", "none again"))
    both = [(one_s + other_s) / 2 for one_s, other_s in zip(once, again, strict=True)]
    return median_interval(paired_ratios(samples[name]["step_s"], both))


def peak_claim(peaks: Mapping[str, float], mode: str, other: str, goal: float) -> Claim:
    """Return the claim about the worst moment of `mode`, which is counted and not sampled."""
    ratio = peaks[mode] / peaks[other]
    exactly = Interval(median=ratio, low=ratio, high=ratio, coverage=1.0, count=1)
    name = f"peak, {mode} / {other}"
    return Claim(name=name, sense="at most", goal=goal, interval=exactly, exact=True)


def make_record(
    training: Training,
    samples: Samples,
    peak_answers: Mapping[str, Mapping[str, object]],
    facts: Mapping[str, object],
) -> Record:
    """Put the samples, the claims and the ratios together."""
    peaks = peaks_of(peak_answers)
    times = {
        (mode, other): ratio_to_both_nones(samples, mode)
        if other == "none"
        else step_ratio(samples, mode, other)
        for mode, goals in TIME_GOALS.items()
        for other in goals
    }
    claims = []
    for mode, goals in TIME_GOALS.items():
        claims.append(peak_claim(peaks, mode, "none", PEAK_GOAL))
        claims += [
            Claim(
                name=f"step time, {mode} / {other}",
                sense="at most",
                goal=goal,
                interval=times[mode, other],
            )
            for other, goal in goals.items()
        ]
    claims.append(peak_claim(peaks, "auto", "recompute", 1.0))
    return Record(
        claim="activations on the SSD take a fifth of the memory and no time",
        goal="; ".join(f"{claim.name} {claim.sense} {claim.goal}" for claim in claims),
        claims=claims,
        value=times["ssd", "none"].median,
        floor=times["ssd", "none"].median,
        peers={
            "step time, none": times["ssd", "none"].median,
            "step time, recompute": times["ssd", "recompute"].median,
            "peak, none": peaks["ssd"] / peaks["none"],
            "peak, recompute": peaks["ssd"] / peaks["recompute"],
        },
        noise={
            f"step time, {name} / none": step_ratio(samples, name, "none")
            for name in ("none again", "recompute")
        },
        samples={**samples, "peak_bytes": peaks, "peaks": dict(peak_answers)},
        # The directory is a temporary name that means nothing to anyone else.
        settings={key: value for key, value in asdict(training).items() if key != "directory"},
        facts=facts,
    )


def mode_table(samples: Samples, peaks: Mapping[str, float]) -> str:
    """Return everyone's peak and seconds: medians, quartiles beside them."""
    rows = []
    for name, figures in samples.items():
        cells = [name, f"{peaks[name] / MIB:.0f}", f"{peaks[name] / peaks['none']:.1%}"]
        cells += [quartiles_text(figures[key], 3) for key in ("step_s", "cpu_s")]
        spent = [key for key in figures if key not in {"step_s", "cpu_s"}]
        cells.append(", ".join(f"{key} {quartiles_text(figures[key], 3)}" for key in spent))
        rows.append(cells)
    return table(["", "peak MiB", "of none", "step s", "CPU s", ""], rows)


def training_of(arguments: argparse.Namespace, directory: str) -> Training:
    """Return what the command line says that everyone trains."""
    return Training(
        model=arguments.model,
        dropout=arguments.dropout,
        optimizer=arguments.optimizer,
        layers=arguments.layers,
        hidden=arguments.hidden,
        heads=arguments.heads,
        seq_len=arguments.seq_len,
        micro_batch=arguments.micro_batch,
        vocab=arguments.vocab,
        threads=arguments.threads,
        directory=directory,
        staging_bytes=arguments.staging_bytes,
        min_tensor_bytes=arguments.min_tensor_bytes,
        io_engine=arguments.io_engine,
        verify=not arguments.no_verify,
    )


def open_workers(training: Training, names: Sequence[str], stack: ExitStack) -> dict[str, Worker]:
    """Start one process a mode; they stay until `stack` is left."""
    return {name: stack.enter_context(open_worker(name, MODES[name], training)) for name in names}


def parts_of(pairs: int, restarts: int) -> list[int]:
    """Return how many pairs each of `restarts` sets of processes is for."""
    least, more = divmod(pairs, min(pairs, restarts))
    return [least + (number < more) for number in range(min(pairs, restarts))]


def main() -> None:
    """Measure and record; exits with 0 whether the goal is met or not."""
    arguments, parser = parse_arguments()
    samples: Samples = {name: {} for name in MODES}
    with spill_directory(arguments.offload_path, parser) as directory:
        training = training_of(arguments, directory)
        for share in parts_of(arguments.pairs, arguments.restarts):
            with ExitStack() as stack:
                workers = open_workers(training, list(MODES), stack)
                for _ in tqdm(range(NUM_DIGESTS), desc="comparing bits"):
                    require_same_numbers(workers)
                found = measure(workers, warm_up=arguments.warm_up, pairs=share)
                for name, figures in found.items():
                    for key, values in figures.items():
                        samples[name].setdefault(key, []).extend(values)
                peak_answers = {
                    name: worker.ask("peak") for name, worker in tqdm(workers.items(), desc="peaks")
                }
                require_same_numbers(workers)
                facts = {name: worker.facts for name, worker in workers.items()}
    print(mode_table(samples, peaks_of(peak_answers)), end="\n\n")
    write_record(make_record(training, samples, peak_answers, facts), arguments.json)


if __name__ == "__main__":
    main()
