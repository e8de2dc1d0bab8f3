"""Plans traces of many tensors: how long that takes, which a step waits for.

A second without waiting is the goal; the trace is that of a model whose layers save alike, with
random sizes, on a drive that can take a half of it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import (
    Claim,
    Record,
    add_record_arguments,
    median_interval,
    positive,
    write_record,
)
from perfmodel.schedules.activations import plan_activations
from perfmodel.schedules.trace import Channel, Limits, SavedTensor, Trace

GOAL_S = 1.0
MIB = 1 << 20


def trace_of(count: int) -> Trace:
    """Return `count` tensors saved in a second and wanted in the two after it, the last first."""
    rng = random.Random(0)
    slot_s = 1 / count
    tensors = []
    for number in range(count):
        needed_s = 1 + 2 * slot_s * (count - 1 - number)
        nbytes = rng.randint(MIB, 4 * MIB)
        tensors.append(SavedTensor(nbytes, slot_s * number, needed_s, needed_s + slot_s))
    return Trace(tuple(tensors))


def main() -> None:
    """Measure and record; exits with 0 whether the goal is met or not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=1)
    parser.add_argument("--tensors", type=positive, default=50_000, metavar="N", help="(50000)")
    arguments = parser.parse_args()
    trace = trace_of(arguments.tensors)
    total = sum(tensor.nbytes for tensor in trace.tensors)
    limits = Limits(staging_bytes=256 * MIB)
    samples: dict[str, list[float]] = {}
    for index in tqdm(range(arguments.warm_up + arguments.pairs), desc="rounds"):
        for part in (0.5, 1.0, 4.0):
            channel = Channel(
                tier="ssd", write_bytes_per_s=part * total, read_bytes_per_s=part * total
            )
            begin_s = time.perf_counter()
            plan_activations(trace, [channel], limits)
            taken_s = time.perf_counter() - begin_s
            if index >= arguments.warm_up:
                samples.setdefault(f"{part} of a step's bytes a second", []).append(taken_s)
    claims = [
        Claim(
            name=f"seconds, {name}", sense="at most", goal=GOAL_S, interval=median_interval(taken)
        )
        for name, taken in samples.items()
    ]
    intervals = [claim.interval for claim in claims if claim.interval is not None]
    record = Record(
        claim=f"a trace of {arguments.tensors} tensors is planned within a second",
        goal=f"<= {GOAL_S} s at each bandwidth",
        claims=claims,
        value=max(interval.median for interval in intervals),
        floor=None,
        peers={},
        noise={},
        samples=samples,
        settings={"tensors": arguments.tensors},
        facts={},
    )
    write_record(record, arguments.json)


if __name__ == "__main__":
    main()
