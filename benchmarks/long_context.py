"""Fine-tunes a Llama with LoRA on sequences of several lengths, untouched and in exact mode.

Peers are plain LoRA, and layers run again with their inputs on the SSD and the loss in segments;
all take steps in turns, and the memory of some more is counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.long_context_worker import WAYS, Case, open_worker
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
MOST_STAGING_BYTES = 64 * MIB
PEAKS = 3
"""Steps whose memory is counted: what is still on its way then differs."""
NEARLY = 1e-4
"""Of losses, whose sums are in other orders."""
GOALS = {"plain": 6.0, "checkpointing": 1.5}
"""How many times as much memory each takes, at least."""
SLOWEST = 1.35
"""Of plain LoRA's time, at most."""


@dataclass
class Measured:
    """What one way took at one length."""

    step_s: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    peak_bytes: float = 0.0


Found = dict[int, dict[str, Measured]]
"""By length and way."""


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=3)  # some first steps are planned for
    add_path_argument(parser)
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=[2048, 4096, 8192, 16384],
        metavar="N",
        help="(2048 4096 8192 16384)",
    )
    for flag, default in (
        ("--hidden", 512),
        ("--layers", 8),
        ("--vocab", 32000),
        ("--threads", 2),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"({default})")
    return parser.parse_args(), parser


def cases_of(
    ways: Sequence[str], length: int, directory: str, sizes: dict[str, Any]
) -> dict[str, Case]:
    """Return one length's cases, all of which stage four layers' inputs, in fp32, where they do."""
    staging = min(MOST_STAGING_BYTES, 4 * length * sizes["hidden"] * 4)
    given = {"seq_len": length, "directory": directory, "staging_bytes": staging, **sizes}
    return {way: Case(way=way, **given) for way in ways}


def measure(cases: dict[str, Case], *, rounds: int, warm_up: int) -> dict[str, Measured]:
    """Return what each way took, step by step in turns, and the memory of some more."""
    found = {way: Measured() for way in cases}
    with ExitStack() as stack:
        workers = {way: stack.enter_context(open_worker(case)) for way, case in cases.items()}
        for index in tqdm(range(warm_up + rounds), desc="rounds", leave=False):
            for way in round_order(list(workers), index):
                answer = workers[way].ask("step")
                found[way].loss.append(number(answer, "loss"))
                if index >= warm_up:
                    found[way].step_s.append(number(answer, "step_s"))
        for way, worker in workers.items():
            peaks = [number(worker.ask("peak"), "peak_bytes") for _ in range(PEAKS)]
            found[way].peak_bytes = statistics.median(peaks)
    return found


def claims_of(length: int, found: dict[str, Measured]) -> list[Claim]:
    """Return what was to be shown of one length."""
    ours = found["exact"]
    claims = [
        Claim(
            name=f"{length}: memory, {way} / exact",
            sense="at least",
            goal=goal,
            interval=exactly(found[way].peak_bytes / ours.peak_bytes),
            exact=True,
        )
        for way, goal in GOALS.items()
    ]
    claims.append(
        Claim(
            name=f"{length}: time, exact / plain",
            sense="at most",
            goal=SLOWEST,
            interval=median_interval(paired_ratios(ours.step_s, found["plain"].step_s)),
        )
    )
    for way in WAYS:
        pairs = zip(found[way].loss, found["plain"].loss, strict=True)
        apart = max(abs(one / other - 1) for one, other in pairs)
        claims.append(
            Claim(
                name=f"{length}: losses of {way}, apart from plain's",
                sense="at most",
                goal=NEARLY,
                interval=exactly(apart),
                exact=True,
            )
        )
    return claims


def make_record(found: Found, settings: dict[str, object]) -> Record:
    """Put the figures and the claims together."""
    claims = [claim for length, ways in found.items() for claim in claims_of(length, ways)]
    peers = {
        f"{length}: {way} / exact": median_interval(
            paired_ratios(ways[way].step_s, ways["exact"].step_s)
        ).median
        for length, ways in found.items()
        for way in GOALS
    }
    least = [
        each.interval.median for each in claims if each.interval and "memory, plain" in each.name
    ]
    return Record(
        claim="a long sequence trains in a fraction of the memory, with the same losses",
        goal=f"plain LoRA takes at least {GOALS['plain']:g} times as much, checkpointing "
        f"{GOALS['checkpointing']:g}, at no more than {SLOWEST} times plain LoRA's time",
        claims=claims,
        value=min(least),
        floor=None,
        peers=peers,
        noise={},
        samples={
            str(length): {way: asdict(each) for way, each in ways.items()}
            for length, ways in found.items()
        },
        settings=settings,
    )


def main() -> None:
    """Measure and record; exits with 0 whether the goals are met or not."""
    arguments, parser = parse_arguments()
    keys = ("hidden", "layers", "vocab", "threads")
    sizes = {key: getattr(arguments, key) for key in keys}
    found: Found = {}
    with spill_directory(arguments.path, parser) as directory:
        for length in tqdm(arguments.lengths, desc="lengths"):
            cases = cases_of(WAYS, length, directory, sizes)
            found[length] = measure(cases, rounds=arguments.pairs, warm_up=arguments.warm_up)
    rows = [
        [f"{length}, {way}", f"{each.peak_bytes / MIB:.0f}", f"{ratio.median:.2f}"]
        for length, ways in found.items()
        for way, each in ways.items()
        for ratio in [median_interval(paired_ratios(each.step_s, ways["plain"].step_s))]
    ]
    print(table(["", "MiB", "time, over plain"], rows), end="\n\n")
    write_record(
        make_record(found, {**sizes, "most_staging_bytes": MOST_STAGING_BYTES}), arguments.json
    )


if __name__ == "__main__":
    main()
