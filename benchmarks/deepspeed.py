"""Trains with DeepSpeed's ZeRO-3 whose states leave the device: by itself, and by ours.

On the host and on the SSD each, the same model and the same config but for the section `offload`,
in turns. Losses are compared first.
"""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.deepspeed_worker import OURS, STOCK, Case, open_worker
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
from benchmarks.worker import Worker, WorkerError, number

GOALS = {"host": 1.0, "SSD": 2.0}
"""How many times as fast a step is as DeepSpeed's own."""
AGAIN = "ours, host again"
# Of losses: ours rounds as PyTorch's AdamW does, DeepSpeed's on the CPU its own way.
NEARLY = 2e-2
MIB = 1 << 20

Figures = dict[str, dict[str, list[float]]]
"""By name and worker, a step each."""


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=3)
    add_path_argument(parser)
    for flag, default in (
        ("--hidden", 768),
        ("--layers", 12),
        ("--seq-len", 64),
        ("--micro-batch", 2),
        ("--sub-group-size", 20 * 10**6),
        ("--threads", 2),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"({default})")
    return parser.parse_args(), parser


def measure(workers: dict[str, Worker], absent: dict[str, str], *, rounds: int) -> Figures:
    """Let everyone take steps in turns; a peer that fails half-way becomes absent."""
    found: Figures = {key: {} for key in ("step_s", "update_s", "loss", "peak_bytes")}
    for index in tqdm(range(rounds), desc="rounds"):
        for name in round_order(list(workers), index):
            if name in absent:
                continue
            try:
                answer = workers[name].ask("step")
            except WorkerError as error:
                if name not in STOCK:
                    raise
                absent[name] = str(error)
                continue
            for key, by_name in found.items():
                by_name.setdefault(name, []).append(number(answer, key))
    return found


def require_same_losses(losses: dict[str, list[float]], absent: dict[str, str]) -> None:
    """Raise WorkerError where ours differ by a bit, or DeepSpeed's by more than rounding."""
    first = losses["ours, host"]
    for name, others in losses.items():
        if name in absent:
            continue
        if name not in STOCK and others != first:
            raise WorkerError(f"{name} ends in other losses than on the host: {others} {first}")
        for one, other in zip(first, others, strict=True):
            if not math.isclose(one, other, rel_tol=NEARLY):
                raise WorkerError(f"{name} has a loss of {other}, and ours is {one}")


def make_record(case: Case, figures: Figures, absent: dict[str, str], warm_up: int) -> Record:
    """Put the figures and the claims together."""
    samples = {name: steps[warm_up:] for name, steps in figures["step_s"].items()}
    peaks = {name: max(steps) for name, steps in figures["peak_bytes"].items()}
    updates = {name: steps[warm_up:] for name, steps in figures["update_s"].items()}
    claims, peers, bounds = [], {}, {}
    for tier, goal in GOALS.items():
        stock, ours = f"stock, {tier}", f"ours, {tier}"
        interval = None
        if stock not in absent:
            interval = median_interval(paired_ratios(samples[stock], samples[ours]))
            peers[stock] = interval.median
            bounds[tier] = bounds_of(
                *(each[name] for each in (samples, updates) for name in (stock, ours))
            )
        claims.append(
            Claim(
                name=f"speed of a step, states on the {tier}",
                sense="at least",
                goal=goal,
                interval=interval,
                reason=absent.get(stock, ""),
            )
        )
    return Record(
        claim="states that ours moves under ZeRO-3 cost less than what DeepSpeed moves itself",
        goal="as fast on the host, twice as fast on the SSD",
        claims=claims,
        value=min(peers.values(), default=None),
        floor=None,
        peers=peers,
        noise={
            "step, ours on the host again / ours": median_interval(
                paired_ratios(samples[AGAIN], samples["ours, host"])
            )
        },
        samples={"step_s": samples, "update_s": figures["update_s"], "loss": figures["loss"]},
        settings={key: value for key, value in asdict(case).items() if key != "directory"},
        absent=dict(absent),
        facts={"peak_process_bytes": peaks, "of what is not the update": bounds},
    )


def bounds_of(
    stock: list[float], ours: list[float], stock_update: list[float], our_update: list[float]
) -> dict[str, object]:
    """Return how the update alone compares, and a step if ours took no time for it at all.

    Forward and backward are the same code in both, so that no update makes a step faster than that.
    """
    rest = [step_s - update_s for step_s, update_s in zip(ours, our_update, strict=True)]
    return {
        "speed of the update": asdict(median_interval(paired_ratios(stock_update, our_update))),
        "speed of a step without an update": asdict(median_interval(paired_ratios(stock, rest))),
    }


def main() -> None:
    """Measure and record; exits with 0 whether the goals are met or not."""
    arguments, parser = parse_arguments()
    absent: dict[str, str] = {}
    keys = ("hidden", "layers", "seq_len", "micro_batch", "sub_group_size", "threads")
    with ExitStack() as stack:
        directory = stack.enter_context(spill_directory(arguments.path, parser))
        case = Case(directory=directory, **{key: getattr(arguments, key) for key in keys})
        workers: dict[str, Worker] = {}
        for name in (*OURS, AGAIN, *STOCK):
            try:
                kind = "ours, host" if name == AGAIN else name
                workers[name] = stack.enter_context(open_worker(kind, case))
            except WorkerError as error:
                if name not in STOCK:
                    raise
                absent[name] = str(error)
        figures = measure(workers, absent, rounds=arguments.warm_up + arguments.pairs)
    require_same_losses(figures["loss"], absent)
    record = make_record(case, figures, absent, arguments.warm_up)
    peaks = {name: max(steps) / MIB for name, steps in figures["peak_bytes"].items()}
    rows = [
        [name, quartiles_text(steps[arguments.warm_up :], 3), f"{peaks[name]:.0f}"]
        for name, steps in figures["step_s"].items()
    ]
    print(table(["", "s a step", "peak MiB of the process"], rows), end="\n\n")
    write_record(record, arguments.json)


if __name__ == "__main__":
    main()
