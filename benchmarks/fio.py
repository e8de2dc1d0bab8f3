"""Runs fio, the floor under everything that moves bytes to a drive."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from benchmarks.worker import WorkerError

__all__ = ["cpu_s", "fio_program", "run_fio"]

COMMON = (
    "--ioengine=io_uring",
    "--direct=1",
    # Its own work on the buffers is not what is compared.
    "--scramble_buffers=0",
    "--output-format=json",
)


def fio_program() -> str:
    """Return where fio is; raises WorkerError where it is nowhere."""
    program = shutil.which("fio")
    if program is None:
        raise WorkerError("fio is not installed")
    return program


def run_fio(flags: Sequence[str], moves: dict[str, int]) -> dict[str, Any]:
    """Run one job of `flags` and return what fio says of it.

    `moves`: how many bytes it is to move, by "read" and "write". Raises WorkerError where fio
    refuses, or moves another number of bytes.
    """
    # In scattered pages a block of 1 MiB has more segments than the drive takes at once and is
    # split: half the speed. Ours and long-lived peers have better pages; so shall the floor.
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    command = [fio_program(), *COMMON, *flags]  # the engine first, then its own flags
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise WorkerError(f"fio: code {done.returncode}: {words[-1] if words else ''}")
    # Notes may stand before the object.
    job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    moved = sum(job[way]["io_bytes"] for way in moves)
    if job["error"] or moved != sum(moves.values()):
        raise WorkerError(f"fio: error {job['error']}, {moved} bytes moved")
    return job


def cpu_s(job: dict[str, Any]) -> float:
    """Return the CPU seconds of a job that `run_fio` returned."""
    return float((job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3)
