"""Trains with DeepSpeed's states on a drive that has no room for them: by itself, and by ours.

Root may have a small file system made for it (`--make`); others name one with little room. Both are
compared with the same training whose states are on the host. A run that ends in other losses
without a word has lost data.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.deepspeed_worker import Case, open_worker
from benchmarks.record import ROOT, Claim, Interval, Record, positive, table, write_record
from benchmarks.worker import Worker, WorkerError, number

MIB = 1 << 20
WAYS = ("ours, host", "stock, host", "ours, SSD", "stock, SSD")
Came = dict[str, dict[str, object]]
"""By way: the losses, and what it said."""


@contextmanager
def small_drive(mebibytes: int) -> Iterator[str]:
    """Give a directory on an ext4 file system of a size, in a file; only root may."""
    place = ROOT / "build"
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="small-", dir=place) as directory:
        image, target = Path(directory) / "image", Path(directory) / "mounted"
        target.mkdir()
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, mebibytes * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(target)], check=True)
        try:
            yield str(target)
        finally:
            subprocess.run(["umount", "-l", str(target)], check=False)


def came_of(way: str, case: Case, steps: int) -> dict[str, object]:
    """Return the losses of a training, until it ends by an error."""
    losses: list[float] = []
    try:
        with open_worker(way, case) as worker:
            losses.extend(loss_of(worker) for _ in range(steps))
    except WorkerError as error:
        return {"losses": losses, "said": str(error).replace(case.directory, "DIR")}
    return {"losses": losses, "said": ""}


def loss_of(worker: Worker) -> float:
    """Take a step; a loss that is no number is one that was lost."""
    loss = worker.ask("step", timeout_s=120)["loss"]
    return math.nan if loss is None else number({"loss": loss}, "loss")


def verdict(came: Came, way: str) -> str:
    """Return what a run came to beside the same on the host: right, said so, or silently wrong.

    Ours must have its bits; DeepSpeed's own has those of its own on the host.
    """
    tier = "ours, host" if way.startswith("ours") else "stock, host"
    right, found = came[tier]["losses"], came[way]["losses"]
    assert isinstance(found, list)
    if came[way]["said"]:
        return f"stopped after {len(found)} steps: {came[way]['said']}"
    return "the losses of the host" if found == right else "other losses, and not a word"


def main() -> None:
    """Measure and record; exits with 0 whatever came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--path", type=Path, metavar="DIR", help="on a drive with little room")
    where.add_argument("--make", type=positive, metavar="MIB", help="make a drive of so much")
    parser.add_argument("--steps", type=positive, default=12, metavar="N", help="(12)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    arguments = parser.parse_args()
    came: Came = {}
    for way in WAYS:
        drive = small_drive(arguments.make) if arguments.make else given(arguments.path)
        with drive as directory:
            case = Case(
                hidden=384,
                layers=6,
                seq_len=64,
                micro_batch=2,
                sub_group_size=2 * 10**6,
                threads=2,
                directory=directory,
            )
            came[way] = came_of(way, case, arguments.steps)
    verdicts = {way: verdict(came, way) for way in WAYS}
    print(table(["", "came to"], [[way, words] for way, words in verdicts.items()]), end="\n\n")
    silent = int("not a word" in verdicts["ours, SSD"])
    interval = Interval(median=silent, low=silent, high=silent, coverage=1.0, count=1)
    record = Record(
        claim="states that find no room on the SSD are never lost without a word",
        goal="an error, or the losses of the host",
        claims=[
            Claim(
                name="ours: other losses without a word",
                sense="at most",
                goal=0,
                interval=interval,
                exact=True,
            )
        ],
        value=silent,
        floor=None,
        peers={},
        noise={},
        samples={way: each["losses"] for way, each in came.items()},
        settings={"drive_bytes": (arguments.make or 0) * MIB, "steps": arguments.steps},
        facts=verdicts,
    )
    write_record(record, arguments.json)


@contextmanager
def given(path: Path) -> Iterator[str]:
    """Give the directory that was named."""
    yield str(path)


if __name__ == "__main__":
    main()
