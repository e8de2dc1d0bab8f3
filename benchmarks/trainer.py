"""Trains with the Hugging Face Trainer, stock and by a plan: memory and time of a step.

A Llama-, a GPT-2- and a T5-shaped model, whole and with LoRA, with DeepSpeed (ZeRO-2) and without;
both take steps in turns.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import (
    Claim,
    Interval,
    Record,
    add_record_arguments,
    median_interval,
    paired_ratios,
    positive,
    round_order,
    table,
    write_record,
)
from benchmarks.spill_directory import add_path_argument, spill_directory
from benchmarks.trainer_worker import MODELS, Case, open_worker
from benchmarks.worker import number

GOAL = 0.9
"""Of stock's memory, at most."""
MIB = 1 << 20
WAYS = ("stock", "ours", "stock again")

Figures = dict[str, dict[str, float | list[float]]]
"""By way: seconds a step, and the bytes of its worst moment."""


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=3)
    add_path_argument(parser)
    parser.add_argument(
        "--zero", choices=("both", "with", "without"), default="both", help="ZeRO-2 or not (both)"
    )
    for flag, default in (
        ("--hidden", 512),
        ("--layers", 6),
        ("--seq-len", 256),
        ("--micro-batch", 8),
        ("--vocab", 1024),
        ("--threads", 2),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"({default})")
    return parser.parse_args(), parser


def measure(case: Case, *, rounds: int, warm_up: int) -> Figures:
    """Return what stock and ours took, step by step in turns, and the memory of one more step."""
    steps: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        workers = {
            way: stack.enter_context(open_worker(way, case, ours=way == "ours")) for way in WAYS
        }
        for index in range(warm_up + rounds):
            for way in round_order(list(workers), index):
                seconds = number(workers[way].ask("step"), "step_s")
                if index >= warm_up:
                    steps[way].append(seconds)
        peaks = {way: number(workers[way].ask("peak"), "peak_bytes") for way in WAYS}
    return {way: {"step_s": steps[way], "peak_bytes": peaks[way]} for way in WAYS}


def steps_of(figures: Figures, way: str) -> list[float]:
    """Return the seconds of a way's steps."""
    found = figures[way]["step_s"]
    assert isinstance(found, list)
    return found


def make_record(found: dict[str, Figures], case: Case) -> Record:
    """Put the figures and the claims together."""
    claims, times, noise = [], {}, {}
    for name, figures in found.items():
        ours, stock = (figures[way]["peak_bytes"] for way in ("ours", "stock"))
        assert isinstance(ours, float | int)
        assert isinstance(stock, float | int)
        part = ours / stock
        interval = Interval(median=part, low=part, high=part, coverage=1.0, count=1)
        goal = f"{name}: memory, ours / stock"
        claims.append(Claim(name=goal, sense="at most", goal=GOAL, interval=interval, exact=True))
        own = steps_of(figures, "stock")
        times[name] = median_interval(paired_ratios(steps_of(figures, "ours"), own))
        noise[name] = median_interval(paired_ratios(steps_of(figures, "stock again"), own))
    settings = {
        key: value
        for key, value in asdict(case).items()
        if key not in ("directory", "model", "lora", "deepspeed")
    }
    ratios = {name: asdict(each) for name, each in times.items()}
    return Record(
        claim="the Trainer trains by a plan in less memory",
        goal=f"at most {GOAL} of the memory of a step",
        claims=claims,
        value=max(claim.interval.median for claim in claims if claim.interval),
        floor=None,
        peers={name: interval.median for name, interval in times.items()},
        noise=noise,
        samples=found,
        settings=settings,
        facts={"time of a step, ours / stock": ratios},
    )


def main() -> None:
    """Measure and record; exits with 0 whether the goals are met or not."""
    arguments, parser = parse_arguments()
    keys = ("hidden", "layers", "seq_len", "micro_batch", "vocab", "threads")
    sizes = {key: getattr(arguments, key) for key in keys}
    found: dict[str, Figures] = {}
    with spill_directory(arguments.path, parser) as directory:
        zero = {"both": (False, True), "with": (True,), "without": (False,)}[arguments.zero]
        cases = [
            Case(model=model, lora=lora, deepspeed=deepspeed, directory=directory, **sizes)
            for model, lora, deepspeed in itertools.product(MODELS, (False, True), zero)
        ]
        for case in tqdm(cases, desc="cases"):
            name = case.model + (", LoRA" if case.lora else "")
            name += ", ZeRO-2" if case.deepspeed else ""
            found[name] = measure(case, rounds=arguments.pairs, warm_up=arguments.warm_up)
    record = make_record(found, cases[0])
    rows = []
    for name, figures in found.items():
        peaks = [float(figures[way]["peak_bytes"]) / MIB for way in ("stock", "ours")]  # type: ignore[arg-type]
        rows.append([name, *(f"{peak:.0f}" for peak in peaks), f"{record.peers[name]:.2f}"])
    print(table(["", "stock MiB", "ours MiB", "time, ours / stock"], rows), end="\n\n")
    write_record(record, arguments.json)


if __name__ == "__main__":
    main()
