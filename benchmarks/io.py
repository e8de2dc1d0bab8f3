"""Writes and reads tensors through the spill, against fio, DeepSpeed's aio handle and kvikio.

All subjects overwrite space of their own in the same directory, in turns; ours also copies every
byte, since torch's tensors are not aligned for O_DIRECT, and makes and compares its checksums.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.io_peers import Fio
from benchmarks.io_worker import open_worker
from benchmarks.io_workload import Workload
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

PEERS = ("fio", "aio", "kvikio")
GOALS = {"fio": 0.97, "aio": 1.0}
CPU_GOAL_S = 0.25
GIB = 1 << 30

Samples = dict[str, dict[str, list[float]]]


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=2)
    add_path_argument(parser)
    parser.add_argument("--bytes", type=positive, default=4 * GIB, help="of one pass (4 GiB)")
    parser.add_argument("--tensor-bytes", type=positive, default=64 << 20, help="(64 MiB)")
    parser.add_argument("--block-bytes", type=positive, default=1 << 20, help="(1 MiB)")
    parser.add_argument("--queue-depth", type=positive, default=32, help="(32)")
    parser.add_argument("--staging-bytes", type=positive, default=256 << 20, help="(256 MiB)")
    parser.add_argument("--io-engine", choices=("auto", "uring", "posix"), default="auto")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    return parser.parse_args(), parser


def open_subjects(
    workload: Workload, chosen: Sequence[str], stack: ExitStack
) -> tuple[dict[str, Worker | Fio], dict[str, str]]:
    """Start ours and the chosen peers, check that each reads what it wrote; and who is absent."""
    ours = stack.enter_context(open_worker("ours", workload))
    subjects: dict[str, Worker | Fio] = {"ours": ours}
    _prove(ours)
    absent = {name: "not asked for" for name in PEERS if name not in chosen}
    fixed_buffers = bool(ours.facts.get("registered_buffers"))
    for name in tqdm(chosen, desc="starting peers", leave=False):
        try:
            if name == "fio":
                fio = stack.enter_context(Fio(workload, fixed_buffers=fixed_buffers))
                fio.ask("write")
                subjects[name] = fio
            else:
                worker = stack.enter_context(open_worker(name, workload))
                _prove(worker)
                subjects[name] = worker
        except WorkerError as error:
            absent[name] = str(error)
    return subjects, absent


def _prove(worker: Worker) -> None:
    worker.ask("write")
    wrong = worker.ask("check")["wrong"]
    if wrong:
        raise WorkerError(f"{worker.name}: tensors {wrong} did not come back as written")


def measure(
    subjects: dict[str, Worker | Fio], absent: dict[str, str], *, warm_up: int, pairs: int
) -> Samples:
    """Let every subject write and read in turns; a peer that fails half-way becomes absent."""
    # The same worker twice a round is the noise that everything else is to be judged by.
    turns = {**subjects, "ours again": subjects["ours"]}
    samples: Samples = {name: {} for name in turns}
    for index in tqdm(range(warm_up + pairs), desc="rounds"):
        for name in round_order(list(turns), index):
            try:
                answers = {request: turns[name].ask(request) for request in ("write", "read")}
            except WorkerError as error:
                if name.startswith("ours"):
                    raise
                absent[name] = str(error)
                del turns[name], samples[name]
                continue
            if index >= warm_up:
                for request, answer in answers.items():
                    for key in answer:
                        figures = samples[name].setdefault(f"{request}_{key}", [])
                        figures.append(number(answer, key))
    return samples


def claims_of(samples: Samples, absent: Mapping[str, str], gib: float) -> list[Claim]:
    """Return every claim with its goal: bandwidth against each peer, then CPU seconds."""
    claims = []
    for peer, goal in GOALS.items():
        for request in ("write", "read"):
            interval = None
            if peer in samples:
                key = f"{request}_wall_s"
                ratios = paired_ratios(samples[peer][key], samples["ours"][key])
                interval = median_interval(ratios)
            claims.append(
                Claim(
                    name=f"{request} bandwidth / {peer}",
                    sense="at least",
                    goal=goal,
                    interval=interval,
                    reason=absent.get(peer, ""),
                )
            )
    ours = samples["ours"]
    cpu_s = [
        (copy_s + verify_s) / gib
        for copy_s, verify_s in zip(ours["write_copy_s"], ours["read_verify_s"], strict=True)
    ]
    claims.append(
        Claim(
            name="copy + checksums, CPU s a GiB out and back",
            sense="at most",
            goal=CPU_GOAL_S,
            interval=median_interval(cpu_s),
        )
    )
    return claims


def make_record(
    workload: Workload,
    samples: Samples,
    absent: Mapping[str, str],
    facts: Mapping[str, object],
) -> Record:
    """Put the samples, the claims and the ratios together."""
    claims = claims_of(samples, absent, workload.total_bytes / GIB)
    peers: dict[str, float | None] = {}
    for peer in PEERS:
        for request in ("write", "read"):
            key = f"{request}_wall_s"
            found = samples.get(peer)
            peers[f"{peer} {request}"] = (
                statistics.median(paired_ratios(found[key], samples["ours"][key]))
                if found
                else None
            )
    floors = [ratio for name, ratio in peers.items() if name.startswith("fio") and ratio]
    return Record(
        claim="the spill moves tensors as fast as the drive goes",
        goal=(
            f"write and read bandwidth >= {GOALS['fio']} of fio and >= {GOALS['aio']} of "
            f"DeepSpeed's aio; copy and checksums <= {CPU_GOAL_S} CPU s a GiB"
        ),
        claims=claims,
        value=min(floors, default=None),
        floor=min(floors, default=None),
        peers=peers,
        noise={
            f"{request}, ours again / ours": median_interval(
                paired_ratios(
                    samples["ours"][f"{request}_wall_s"], samples["ours again"][f"{request}_wall_s"]
                )
            )
            for request in ("write", "read")
        },
        samples=samples,
        # The directory is a temporary name that means nothing to anyone else.
        settings={key: value for key, value in asdict(workload).items() if key != "directory"},
        absent=absent,
        facts=facts,
    )


def bandwidth_table(samples: Samples, total_bytes: int) -> str:
    """Return everyone's bandwidth and CPU seconds: medians, quartiles beside them."""
    rows = []
    for name, figures in samples.items():
        cells = [name]
        for request in ("write", "read"):
            speeds = [total_bytes / 1e9 / wall_s for wall_s in figures[f"{request}_wall_s"]]
            cpu_s = [cpu_s / (total_bytes / GIB) for cpu_s in figures[f"{request}_cpu_s"]]
            cells += [quartiles_text(speeds), quartiles_text(cpu_s, 3)]
        rows.append([*cells, ""])
    head = ["", "write GB/s", "CPU s/GiB", "read GB/s", "CPU s/GiB", ""]
    return table(head, rows)


def main() -> None:
    """Measure and record; exits with 0 whether the goal is met or not."""
    arguments, parser = parse_arguments()
    with ExitStack() as stack:
        directory = stack.enter_context(spill_directory(arguments.path, parser))
        try:
            workload = Workload(
                directory=directory,
                total_bytes=arguments.bytes,
                tensor_bytes=arguments.tensor_bytes,
                block_bytes=arguments.block_bytes,
                queue_depth=arguments.queue_depth,
                staging_bytes=arguments.staging_bytes,
                io_engine=arguments.io_engine,
            )
        except ValueError as error:
            parser.error(str(error))
        subjects, absent = open_subjects(workload, arguments.peers, stack)
        samples = measure(subjects, absent, warm_up=arguments.warm_up, pairs=arguments.pairs)
        facts = {name: subject.facts for name, subject in subjects.items()}
    print(bandwidth_table(samples, workload.total_bytes), end="\n\n")
    write_record(make_record(workload, samples, absent, facts), arguments.json)


if __name__ == "__main__":
    main()
