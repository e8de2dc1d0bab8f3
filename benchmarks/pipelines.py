"""Simulates pipelines by their schedules' real order, with activations kept, run again and moved.

Nothing is timed: a stage takes what the performance model says of a model on a machine. For each
number of stages, chunks and micro-batches, the bubble, what a rank holds, and what its drive must
take; then, at a limit of memory, the fastest step of each way, with its micro-batch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import (
    Claim,
    Interval,
    Record,
    add_record_arguments,
    positive,
    table,
    write_record,
)
from perfmodel.cluster import StageCosts, bubble_share
from perfmodel.known_models import read_known_model
from perfmodel.machine import Machine, read_machine
from perfmodel.network import sent_s
from perfmodel.pipeline_step import PipelineStep, chunk_costs, pipeline_step
from perfmodel.workload import Parallel, Workload

GIB = 1 << 30
STAGES, CHUNKS, MICRO_BATCHES = (2, 4, 8), (1, 2), (4, 8, 16, 32)
WAYS = ("keep", "recompute", "ssd")
SEQUENCES = 64
"""Of a step, when ways are compared at a limit of memory."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The largest micro-batch that fits, and what a step with it comes to."""

    micro_batch: int
    chunks: int
    tokens_per_s: float
    bubble_share: float
    flops_per_s: float
    """Of products of matrices, on each device, what is run again left out."""
    update_share: float
    """Of the step, what sums of gradients and the update take."""
    held_bytes: float


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=1)
    parser.add_argument("--model", default="llama-2-13b", help="(llama-2-13b)")
    parser.add_argument("--machine", default="ssdtrain", help="(ssdtrain)")
    parser.add_argument("--seq-len", type=positive, default=2048, metavar="N", help="(2048)")
    parser.add_argument(
        "--limits-gib",
        type=positive,
        nargs="+",
        default=[12, 16, 24],
        metavar="N",
        help="of activations on a rank (12 16 24)",
    )
    return parser.parse_args()


def stepped(workload: Workload, machine: Machine, way: str) -> PipelineStep:
    """Return what a step of a pipeline takes one way."""
    costs = chunk_costs(workload, machine, recompute=way == "recompute", moves=way == "ssd")
    one_way_s = sent_s(workload, machine) / 2 / workload.parallel.chunks
    return pipeline_step(costs, workload.accumulation, sent_s=one_way_s)


def sizes(first: Workload) -> Iterator[Workload]:
    """Yield all pipelines that there are."""
    for stages in STAGES:
        for chunks in CHUNKS:
            for micro_batches in MICRO_BATCHES:
                # Megatron interleaves only whole rounds of its stages.
                if chunks == 1 or micro_batches % stages == 0:
                    parallel = replace(first.parallel, pipeline=stages, chunks=chunks)
                    yield replace(first, accumulation=micro_batches, parallel=parallel)


def best(first: Workload, machine: Machine, way: str, limit_bytes: float) -> Choice | None:
    """Return the way's fastest step of `SEQUENCES` whose activations fit."""
    found: list[Choice] = []
    for chunks in CHUNKS:
        for micro_batch in (1, 2, 4, 8, 16):
            parallel, count = replace(first.parallel, chunks=chunks), SEQUENCES // micro_batch
            if chunks > 1 and count % parallel.pipeline:
                continue
            workload = replace(
                first, micro_batch=micro_batch, accumulation=count, parallel=parallel
            )
            step = stepped(workload, machine, way)
            if max(step.device_bytes) > limit_bytes:
                continue
            costs = StageCosts(workload, machine, False)
            after_s = costs.gradients_s + costs.update_s
            step_s = step.duration_s + after_s
            found.append(
                Choice(
                    micro_batch=micro_batch,
                    chunks=chunks,
                    tokens_per_s=workload.tokens / step_s,
                    bubble_share=step.bubble_share,
                    flops_per_s=costs.stage_flops * workload.accumulation / step_s,
                    update_share=after_s / step_s,
                    held_bytes=max(step.device_bytes),
                )
            )
    return max(found, key=lambda each: each.tokens_per_s, default=None)


def exactly(name: str, value: float, goal: float, *, least: bool = False) -> Claim:
    """Return a claim on what was counted."""
    return Claim(
        name=name,
        sense="at least" if least else "at most",
        goal=goal,
        interval=Interval(median=value, low=value, high=value, coverage=1.0, count=1),
        exact=True,
    )


@dataclass
class Swept:
    """What all pipelines came to."""

    rows: list[list[str]] = field(default_factory=list)
    samples: dict[str, dict[str, object]] = field(default_factory=dict)
    slower: list[float] = field(default_factory=list)
    smaller: list[float] = field(default_factory=list)


def swept(first: Workload, machine: Machine) -> Swept:
    """Simulate every pipeline each way."""
    found = Swept()
    for workload in tqdm([*sizes(first)], desc="pipelines"):
        parallel, count = workload.parallel, workload.accumulation
        steps = {way: stepped(workload, machine, way) for way in WAYS}
        kept, moved = steps["keep"], steps["ssd"]
        name = f"{parallel.pipeline} stages x {parallel.chunks}, {count} micro-batches"
        found.samples[name] = {way: asdict(each) for way, each in steps.items()}
        found.slower.append(moved.duration_s / kept.duration_s)
        found.smaller.append(max(moved.device_bytes) / max(kept.device_bytes))
        found.rows.append(
            [
                name,
                f"{bubble_share(parallel.pipeline, count, parallel.chunks):.1%}",
                f"{kept.bubble_share:.1%}",
                f"{moved.bubble_share:.1%}",
                f"{found.slower[-1]:.3f}",
                f"{max(kept.device_bytes) / GIB:.2f}",
                f"{max(moved.device_bytes) / GIB:.2f}",
                f"{moved.write_bytes_per_s / 1e9:.2f}",
            ]
        )
    return found


def chosen_rows(choices: Mapping[str, Choice | None]) -> list[list[str]]:
    """Return what is shown of the fastest steps."""
    return [
        [
            way,
            f"{each.micro_batch} x {each.chunks}",
            f"{each.tokens_per_s:.0f}",
            f"{each.bubble_share:.1%}",
            f"{each.flops_per_s / 1e12:.0f}",
            f"{each.update_share:.1%}",
        ]
        for way, each in choices.items()
        if each is not None
    ]


def main() -> None:
    """Simulate and record; exits with 0 whether the goals are met or not."""
    arguments = parse_arguments()
    machine = read_machine(arguments.machine)
    first = Workload(
        model=read_known_model(arguments.model),
        seq_len=arguments.seq_len,
        micro_batch=1,
        accumulation=16,
        dtype="bfloat16",
        parallel=Parallel(pipeline=4),
        framework="megatron",
    )
    found = swept(first, machine)
    head = ["", "published", "bubble, kept", "moved", "time", "GiB, kept", "moved", "GB/s"]
    print(table(head, found.rows), end="\n\n")
    at_limits, claims = {}, []
    for limit in arguments.limits_gib:
        choices = {way: best(first, machine, way, limit * GIB) for way in WAYS}
        print(f"The fastest of {SEQUENCES} sequences, {limit} GiB of them on a rank:")
        head = ["", "micro-batch x chunks", "tokens/s", "bubble", "TFLOP/s", "update"]
        print(table(head, chosen_rows(choices)), end="\n\n")
        at_limits[f"{limit} GiB"] = {way: each and asdict(each) for way, each in choices.items()}
        ours, theirs = choices["ssd"], [choices[way] for way in WAYS[:2]]
        fastest = max((each.tokens_per_s for each in theirs if each), default=math.nan)
        gain = math.nan if ours is None else ours.tokens_per_s / fastest
        name = f"tokens/s in {limit} GiB, moved / the best other"
        claims.append(exactly(name, gain, 1.0, least=True))
    record = Record(
        claim="every pipeline has its activations back in time, in less memory",
        goal="at most 1.05 of the time that keeping all takes",
        claims=[
            exactly("time, moved / kept, the worst", max(found.slower), 1.05),
            exactly("memory, moved / kept, the worst", max(found.smaller), 1.0),
            *claims,
        ],
        value=max(found.slower),
        floor=None,
        peers={},
        noise={},
        samples=found.samples,
        settings={
            "model": arguments.model,
            "machine": arguments.machine,
            "seq_len": arguments.seq_len,
            "limits_gib": arguments.limits_gib,
        },
        facts={"at a limit": at_limits},
    )
    write_record(record, arguments.json)


if __name__ == "__main__":
    main()
