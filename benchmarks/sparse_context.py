"""Fine-tunes a Llama with LoRA on long sequences with blocks of tokens left out of attention.

The same run is measured for time and memory, beside the same without leaving anything out (layers
run again, loss in segments, inputs on the SSD) and beside plain LoRA where that fits. What it costs
in quality, `benchmarks.sparse_quality` says.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.long_context import MIB, MOST_STAGING_BYTES, Found, cases_of, measure
from benchmarks.long_context_worker import SPARSE_WAYS
from benchmarks.record import (
    Claim,
    Record,
    add_record_arguments,
    exactly,
    median_interval,
    paired_ratios,
    positive,
    table,
    write_record,
)
from benchmarks.spill_directory import add_path_argument, spill_directory

FASTER = 1.4
"""Than checkpointing, at the longest length."""
PLAIN = 1.93
"""Times as much memory does plain LoRA take, at least: LeMo's own figure."""


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=2)  # some first steps are planned for
    add_path_argument(parser)
    for flag, lengths, said in (
        ("--lengths", [8192, 16384, 32768], "(8192 16384 32768)"),
        ("--plain-lengths", [8192], "of them where plain LoRA takes part (8192)"),
    ):
        parser.add_argument(flag, type=positive, nargs="+", default=lengths, metavar="N", help=said)
    parser.add_argument("--ratio", type=float, default=0.4, help="kept in later layers (0.4)")
    for flag, default in (
        ("--hidden", 512),
        ("--layers", 8),
        ("--vocab", 32000),
        ("--threads", 2),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"({default})")
    return parser.parse_args(), parser


def claims_of(found: Found) -> list[Claim]:
    """Return what was to be shown."""
    claims = []
    for length, ways in found.items():
        ours, dense = ways["sparse"], ways["checkpointing"]
        last = length == max(found)
        claims.append(
            Claim(
                name=f"{length}: time, checkpointing / sparse",
                sense="at least",
                goal=FASTER if last else 1.0,
                interval=median_interval(paired_ratios(dense.step_s, ours.step_s)),
            )
        )
        goals = {"checkpointing": 1.0} | ({"plain": PLAIN} if "plain" in ways else {})
        claims += [
            Claim(
                name=f"{length}: memory, {way} / sparse",
                sense="at least",
                goal=goal,
                interval=exactly(ways[way].peak_bytes / ours.peak_bytes),
                exact=True,
            )
            for way, goal in goals.items()
        ]
    return claims


def make_record(found: Found, settings: dict[str, object]) -> Record:
    """Put the figures and the claims together."""
    longest = found[max(found)]
    faster = median_interval(
        paired_ratios(longest["checkpointing"].step_s, longest["sparse"].step_s)
    )
    return Record(
        claim="leaving tokens out of attention makes a step of long sequences shorter",
        goal=f"at the longest length {FASTER:g} times as fast as checkpointing with the loss in "
        f"segments, in no more memory; plain LoRA takes {PLAIN:g} times as much",
        claims=claims_of(found),
        value=faster.median,
        floor=None,
        peers={
            f"{length}: {way} / sparse": median_interval(
                paired_ratios(each.step_s, ways["sparse"].step_s)
            ).median
            for length, ways in found.items()
            for way, each in ways.items()
            if way != "sparse"
        },
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
    keys = ("hidden", "layers", "vocab", "threads", "ratio")
    sizes = {key: getattr(arguments, key) for key in keys}
    found: Found = {}
    with spill_directory(arguments.path, parser) as directory:
        for length in tqdm(arguments.lengths, desc="lengths"):
            ways = [
                way for way in SPARSE_WAYS if way != "plain" or length in arguments.plain_lengths
            ]
            cases = cases_of(ways, length, directory, sizes)
            found[length] = measure(cases, rounds=arguments.pairs, warm_up=arguments.warm_up)
    rows = [
        [f"{length}, {way}", f"{each.peak_bytes / MIB:.0f}", f"{ratio.median:.2f}"]
        for length, ways in found.items()
        for way, each in ways.items()
        for ratio in [median_interval(paired_ratios(each.step_s, ways["checkpointing"].step_s))]
    ]
    print(table(["", "MiB", "time, over checkpointing"], rows), end="\n\n")
    write_record(
        make_record(found, {**sizes, "most_staging_bytes": MOST_STAGING_BYTES}), arguments.json
    )


if __name__ == "__main__":
    main()
