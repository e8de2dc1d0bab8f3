"""Trains models of megatron-core, all kept, run again, and by a plan: memory and time of a step.

GPT, BERT and T5 take steps of one forward in turns, with the same bits; then the GPT once more:
that forward by a plan, beside as many tokens in smaller ones that are kept.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.megatron_worker import MODELS, MODES, Case, open_worker
from benchmarks.record import (
    Claim,
    Record,
    add_record_arguments,
    exactly,
    median_interval,
    paired_ratios,
    positive,
    round_order,
    table,
    write_record,
)
from benchmarks.spill_directory import add_path_argument, spill_directory
from benchmarks.worker import number

MIB = 1 << 20
GOAL = 0.9
"""Of the memory of a step that keeps all, at most."""


@dataclass(frozen=True)
class Measured:
    """What one way of training took."""

    step_s: list[float]
    peak_bytes: float
    bits: str


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=2)
    add_path_argument(parser)
    for flag, default in (
        ("--hidden", 512),
        ("--layers", 6),
        ("--seq-len", 256),
        ("--micro-batch", 4),
        ("--micro-batches", 2),
        ("--vocab", 1024),
        ("--threads", 2),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"({default})")
    return parser.parse_args(), parser


def measure(cases: dict[str, Case], *, rounds: int, warm_up: int) -> dict[str, Measured]:
    """Return what each took, step by step in turns, the memory of one more, and their bits."""
    steps: dict[str, list[float]] = {name: [] for name in cases}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(open_worker(name, case)) for name, case in cases.items()
        }
        for index in range(warm_up + rounds):
            for name in round_order(list(workers), index):
                seconds = number(workers[name].ask("step"), "step_s")
                if index >= warm_up:
                    steps[name].append(seconds)
        peaks = {name: number(each.ask("peak"), "peak_bytes") for name, each in workers.items()}
        bits = {name: str(each.ask("bits")["bits"]) for name, each in workers.items()}
    return {name: Measured(steps[name], peaks[name], bits[name]) for name in cases}


def claims_of(found: dict[str, dict[str, Measured]]) -> list[Claim]:
    """Return what was to be shown."""
    claims = []
    for model in MODELS:
        none, again, ours = (found[model][mode] for mode in MODES)
        for name, value, goal in (
            ("memory, ours / none", ours.peak_bytes / none.peak_bytes, GOAL),
            ("memory, ours / recompute", ours.peak_bytes / again.peak_bytes, 1.0),
            ("bits that differ", float(len({none.bits, again.bits, ours.bits}) - 1), 0.0),
        ):
            claims.append(
                Claim(
                    name=f"{model}: {name}",
                    sense="at most",
                    goal=goal,
                    interval=exactly(value),
                    exact=True,
                )
            )
        claims.append(
            Claim(
                name=f"{model}: time, ours / recompute",
                sense="at most",
                goal=1.0,
                interval=median_interval(paired_ratios(ours.step_s, again.step_s)),
            )
        )
    few, one = (found["larger micro-batch"][name] for name in ("none, few", "ssd, all"))
    for name, interval, exact in (
        ("memory", exactly(one.peak_bytes / few.peak_bytes), True),
        ("time", median_interval(paired_ratios(one.step_s, few.step_s)), False),
    ):
        claims.append(
            Claim(
                name=f"larger micro-batch: {name}, ours / none",
                sense="at most",
                goal=1.0,
                interval=interval,
                exact=exact,
            )
        )
    return claims


def make_record(found: dict[str, dict[str, Measured]], settings: dict[str, object]) -> Record:
    """Put the figures and the claims together."""
    ratios = {
        f"{group}: {name}": asdict(
            median_interval(paired_ratios(each.step_s, next(iter(ways.values())).step_s))
        )
        for group, ways in found.items()
        for name, each in ways.items()
    }
    claims = claims_of(found)
    worst = max(
        each.interval.median for each in claims if each.interval and "ours / none" in each.name
    )
    return Record(
        claim="megatron-core trains by a plan with the same bits in less memory",
        goal=f"at most {GOAL} of the memory, and no more than recomputing takes",
        claims=claims,
        value=worst,
        floor=None,
        peers={},
        noise={
            f"{model}: none again / none": median_interval(
                paired_ratios(found[model]["none again"].step_s, found[model]["none"].step_s)
            )
            for model in MODELS
        },
        samples={
            group: {name: asdict(each) for name, each in ways.items()}
            for group, ways in found.items()
        },
        settings=settings,
        facts={"time of a step, over all kept": ratios},
    )


def main() -> None:
    """Measure and record; exits with 0 whether the goals are met or not."""
    arguments, parser = parse_arguments()
    keys = ("hidden", "layers", "seq_len", "micro_batch", "micro_batches", "vocab", "threads")
    sizes = {key: getattr(arguments, key) for key in keys}
    found: dict[str, dict[str, Measured]] = {}
    rounds = {"rounds": arguments.pairs, "warm_up": arguments.warm_up}
    with spill_directory(arguments.path, parser) as directory:
        first = Case(model="gpt", mode="none", directory=directory, **sizes)
        large = first.micro_batch * first.micro_batches
        whole = replace(first, micro_batch=large, micro_batches=1)
        groups = {
            model: {mode: replace(whole, model=model, mode=mode) for mode in MODES}
            | {"none again": replace(whole, model=model)}
            for model in MODELS
        }
        groups["larger micro-batch"] = {
            "none, few": first,
            "ssd, all": replace(whole, mode="ssd"),
            "none, all": whole,
            "recompute, all": replace(whole, mode="recompute"),
        }
        for name, cases in tqdm(groups.items(), desc="models"):
            found[name] = measure(cases, **rounds)
    record = make_record(found, {**sizes})
    rows = [
        [f"{group}, {name}", f"{each.peak_bytes / MIB:.0f}", f"{ratio:.2f}"]
        for group, ways in found.items()
        for name, each in ways.items()
        for ratio in [
            median_interval(paired_ratios(each.step_s, next(iter(ways.values())).step_s)).median
        ]
    ]
    print(table(["", "MiB", "time, over the first"], rows), end="\n\n")
    write_record(record, arguments.json)


if __name__ == "__main__":
    main()
