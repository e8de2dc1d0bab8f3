"""Updates 200 million parameters whose optimizer states lie on the SSD.

Ours, DeepSpeed's ZeRO-Infinity, and fio, which reads and writes as many bytes at once and computes
nothing, take turns in the same directory. Everyone's parameters are compared first.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fio import cpu_s, fio_program, run_fio
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
from benchmarks.states_worker import STATE_BYTES, Sizes, open_worker
from benchmarks.worker import Answer, Worker, WorkerError, number

FLOOR_GOAL = 1.10  # of fio's time
PEER_GOAL = 2.0  # times as fast as DeepSpeed
MIB = 1 << 20
# bfloat16 keeps 8 bits; sums of as many parameters differ by less than this part when few do.
NEARLY = 1e-2

Samples = dict[str, list[float]]


class MixedFio:
    """fio's io_uring engine, reading and writing as many bytes as a step, at the same time.

    Raises WorkerError where fio is absent or refuses; owns its file until close().
    """

    def __init__(self, sizes: Sizes) -> None:
        fio_program()
        self._nbytes = STATE_BYTES * sizes.params // MIB * MIB
        handle, path = tempfile.mkstemp(prefix="fio-", dir=sizes.directory)
        self._path = Path(path)
        os.posix_fallocate(handle, 0, self._nbytes)
        os.close(handle)
        self.facts: Answer = {"nbytes": 2 * self._nbytes}

    def ask(self, _request: str) -> Answer:
        """Return the seconds that fio reports for all bytes in and out."""
        flags = [
            *("--name=mixed", "--rw=rw", "--rwmixread=50", "--bs=1M", "--iodepth=32"),
            *(f"--filename={self._path}", f"--size={self._nbytes}"),
            f"--io_size={2 * self._nbytes}",
        ]
        job = run_fio(flags, {"read": self._nbytes, "write": self._nbytes})
        wall_s = max(job["read"]["runtime"], job["write"]["runtime"], 1) / 1e3
        return {"wall_s": wall_s, "cpu_s": cpu_s(job)}

    def close(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=4)
    add_path_argument(parser)
    for flag, default in (
        ("--params", 200 * 10**6),
        ("--tensor-params", 5 * 10**6),
        ("--subgroup-params", 5 * 10**6),
        ("--staging-bytes", 768 * MIB),
        ("--threads", 2),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"({default})")
    return parser.parse_args(), parser


def require_same_work(workers: Mapping[str, Worker]) -> None:
    """Raise WorkerError where parameters are others than ours after two steps."""
    sums = {}
    for name, worker in workers.items():
        for _ in range(2):
            worker.ask("step")
        sums[name] = worker.ask("sum")["sum"]
    for name, theirs in sums.items():
        assert isinstance(theirs, list)
        ours = sums["ours"]
        assert isinstance(ours, list)
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if not math.isclose(one, other, rel_tol=NEARLY, abs_tol=10.0):
                raise WorkerError(f"{name}: tensor {index} adds up to {other}, but ours to {one}")


def measure(
    turns: dict[str, Worker | MixedFio], absent: dict[str, str], *, warm_up: int, pairs: int
) -> Samples:
    """Let everyone take steps in turns; a peer that fails half-way becomes absent."""
    samples: Samples = {name: [] for name in turns}
    for index in tqdm(range(warm_up + pairs), desc="rounds"):
        for name in round_order(list(turns), index):
            try:
                wall_s = number(turns[name].ask("step"), "wall_s")
            except WorkerError as error:
                if name.startswith("ours"):
                    raise
                absent[name] = str(error)
                del turns[name], samples[name]
                continue
            if index >= warm_up:
                samples[name].append(wall_s)
    return samples


def make_record(
    sizes: Sizes, samples: Samples, absent: Mapping[str, str], facts: Mapping[str, object]
) -> Record:
    """Put the samples and the claims together."""
    floor = peer = None
    if "fio" in samples:
        floor = median_interval(paired_ratios(samples["ours"], samples["fio"]))
    if "deepspeed" in samples:
        peer = median_interval(paired_ratios(samples["deepspeed"], samples["ours"]))
    claims = [
        Claim(
            name="step time / the same bytes by fio",
            sense="at most",
            goal=FLOOR_GOAL,
            interval=floor,
            reason=absent.get("fio", ""),
        ),
        Claim(
            name="speed / DeepSpeed ZeRO-Infinity",
            sense="at least",
            goal=PEER_GOAL,
            interval=peer,
            reason=absent.get("deepspeed", ""),
        ),
    ]
    return Record(
        claim="optimizer states on the SSD cost what their bytes cost",
        goal="; ".join(f"{claim.name} {claim.sense} {claim.goal}" for claim in claims),
        claims=claims,
        value=floor.median if floor else None,
        floor=floor.median if floor else None,
        peers={"deepspeed": peer.median} if peer else {},
        noise={
            "step time, ours again / ours": median_interval(
                paired_ratios(samples["ours again"], samples["ours"])
            )
        },
        samples=samples,
        settings={key: value for key, value in asdict(sizes).items() if key != "directory"},
        absent=dict(absent),
        facts=facts,
    )


def main() -> None:
    """Measure and record; exits with 0 whether the goals are met or not."""
    arguments, parser = parse_arguments()
    if arguments.params % arguments.tensor_params:
        parser.error("--params is not a multiple of --tensor-params; choose both so")
    absent: dict[str, str] = {}
    with ExitStack() as stack:
        directory = stack.enter_context(spill_directory(arguments.path, parser))
        keys = ("params", "tensor_params", "subgroup_params", "staging_bytes", "threads")
        sizes = Sizes(directory=directory, **{key: getattr(arguments, key) for key in keys})
        workers = {"ours": stack.enter_context(open_worker("ours", sizes))}
        turns: dict[str, Worker | MixedFio] = {}
        try:
            workers["deepspeed"] = stack.enter_context(open_worker("deepspeed", sizes))
        except WorkerError as error:
            absent["deepspeed"] = str(error)
        try:
            turns["fio"] = MixedFio(sizes)
            stack.callback(turns["fio"].close)
        except WorkerError as error:
            absent["fio"] = str(error)
        require_same_work(workers)
        # The same worker twice a round is the noise that everything else is to be judged by.
        turns |= {**workers, "ours again": workers["ours"]}
        samples = measure(turns, absent, warm_up=arguments.warm_up, pairs=arguments.pairs)
        facts = {name: subject.facts for name, subject in turns.items()}
    rows = [[name, quartiles_text(seconds, 3)] for name, seconds in samples.items()]
    print(table(["", "s a step"], rows), end="\n\n")
    write_record(make_record(sizes, samples, absent, facts), arguments.json)


if __name__ == "__main__":
    main()
