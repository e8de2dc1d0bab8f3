"""Times AdamW over all subgroups of ZeRO-3 at once, and one after the other as DeepSpeed calls it.

The first is what a subclass of its stage 3 could come to, the second what its own loop does.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import offload
from benchmarks.record import (
    Claim,
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
from benchmarks.spill_directory import add_path_argument, spill_directory

MIB = 1 << 20
GOAL = 1.05
"""How much longer one after the other may take before a subclass would be worth its upkeep."""


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=2)
    add_path_argument(parser)
    for flag, default in (("--subgroups", 6), ("--sub-group-size", 20 * 10**6)):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"({default})")
    return parser.parse_args(), parser


def main() -> None:
    """Measure and record; exits with 0 whether the goal is met or not."""
    arguments, parser = parse_arguments()
    steps: dict[str, list[float]] = {}
    with ExitStack() as stack:
        directory = stack.enter_context(spill_directory(arguments.path, parser))
        params = [
            torch.nn.Parameter(torch.randn(arguments.sub_group_size))
            for _ in range(arguments.subgroups)
        ]
        optimizer = offload.AdamW(
            params, lr=1e-4, placement="ssd", path=[directory], staging_bytes=512 * MIB
        )
        stack.callback(optimizer.close)
        for param in params:
            param.grad = torch.randn_like(param)
        ways = {
            "all at once": [params],
            "one by one": [[param] for param in params],
            "all at once, again": [params],
        }
        steps = {way: [] for way in ways}
        for index in tqdm(range(arguments.warm_up + arguments.pairs), desc="rounds"):
            for way in round_order(list(ways), index):
                begin_s = time.perf_counter()
                for part in ways[way]:
                    optimizer.step_of(part, settle=False)
                if index >= arguments.warm_up:
                    steps[way].append(time.perf_counter() - begin_s)
    whole, single, again = steps.values()
    interval = median_interval(paired_ratios(single, whole))
    claim = Claim(name="one by one / all at once", sense="at most", goal=GOAL, interval=interval)
    record = Record(
        claim="DeepSpeed's own loop over subgroups costs little with states on the SSD",
        goal=f"at most {GOAL} of an update of all at once",
        claims=[claim],
        value=interval.median,
        floor=None,
        peers={},
        noise={"all at once, again": median_interval(paired_ratios(again, whole))},
        samples=steps,
        settings={"subgroups": arguments.subgroups, "sub_group_size": arguments.sub_group_size},
        facts={},
    )
    rows = [[way, quartiles_text(seconds, 3)] for way, seconds in steps.items()]
    print(table(["", "s a step"], rows), end="\n\n")
    write_record(record, arguments.json)


if __name__ == "__main__":
    main()
