"""What this machine can do for offloading: each line yes or no, and why."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from offload.device import device_facts, direct_facts
from offload.native import DirectoryFacts, crc32c_path, inspect_directory, probe_engines

__all__ = ["CHECKS", "Finding", "directory_problem", "examine"]

GIB = float(1 << 30)
# Reading back a micro-batch of a small model already moves more than this.
ROOM_BYTES = 4 << 30
OPEN_FILES = 256


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, whether it is there, and why."""

    name: str
    ok: bool
    why: str


def _engine(name: str) -> Finding:
    works, why = probe_engines()[name]
    return Finding(name, works, why)


def _directory(path: str, judge: Callable[[DirectoryFacts], Finding], name: str) -> Finding:
    try:
        return judge(inspect_directory(path))
    except OSError as error:
        return Finding(name, False, f"{path}: {error.strerror}")


def _direct(facts: DirectoryFacts) -> Finding:
    return Finding(
        "o_direct", facts.direct, f"{facts.path} ({facts.filesystem}): {facts.direct_reason}"
    )


def _disk(facts: DirectoryFacts) -> Finding:
    why = {
        "disk": "a local disk",
        "memory": "in RAM, where offloading saves nothing; choose a directory on an SSD",
        "network": "on the network, which keeps files of a killed job; choose a local disk",
    }[facts.backing]
    return Finding("disk", facts.backing == "disk", f"{facts.path} ({facts.filesystem}): {why}")


def _space(facts: DirectoryFacts) -> Finding:
    return Finding(
        "free_space",
        facts.free_bytes >= ROOM_BYTES,
        f"{facts.path}: {facts.free_bytes / GIB:.1f} GiB free of {facts.total_bytes / GIB:.1f} GiB;"
        " by default half of the free space may be used",
    )


def _limit(kind: int) -> float:
    soft, _ = resource.getrlimit(kind)
    return float("inf") if soft == resource.RLIM_INFINITY else soft


def _may_lock_any_amount() -> bool:
    """Say whether this process holds CAP_IPC_LOCK, which the memlock limit does not bind."""
    cap_ipc_lock = 14
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return bool(int(fields["CapEff"], 16) >> cap_ipc_lock & 1)
    except (OSError, KeyError, ValueError):
        return False


def _memlock(_path: str) -> Finding:
    if _may_lock_any_amount():
        return Finding("memlock", True, "CAP_IPC_LOCK: buffers of any size can be registered")
    limit = _limit(resource.RLIMIT_MEMLOCK)
    staging = 256 << 20
    text = "unlimited" if limit == float("inf") else f"{limit / (1 << 20):.0f} MiB"
    if limit >= staging:
        return Finding("memlock", True, f"limit {text}: the staging arena can be registered")
    return Finding(
        "memlock",
        False,
        f"limit {text} is below the 256 MiB of staging: buffers stay unregistered, which costs a "
        "little CPU time a byte; raise it with `ulimit -l`",
    )


def _open_files(_path: str) -> Finding:
    limit = _limit(resource.RLIMIT_NOFILE)
    return Finding("open_files", limit >= OPEN_FILES, f"limit {limit:.0f}; {OPEN_FILES} are plenty")


def _file_size(_path: str) -> Finding:
    limit = _limit(resource.RLIMIT_FSIZE)
    if limit == float("inf"):
        return Finding("file_size", True, "no limit on the size of a file")
    return Finding("file_size", limit >= ROOM_BYTES, f"`ulimit -f` allows {limit / GIB:.1f} GiB")


def _checksum(_path: str) -> Finding:
    path = crc32c_path()
    return Finding(
        "checksum", path != "table", f"CRC32C by {path}" + (" (slow)" if path == "table" else "")
    )


def _torch(_path: str) -> Finding:
    return Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads")


def _gpu(_path: str) -> Finding:
    works, why = device_facts()
    return Finding("gpu", works, why if works else f"{why}; the device tier is host memory")


def _gds(path: str) -> Finding:
    return Finding("gds", *direct_facts(path))


CHECKS: dict[str, Callable[[str], Finding]] = {
    "uring": lambda _path: _engine("uring"),
    "posix": lambda _path: _engine("posix"),
    "disk": lambda path: _directory(path, _disk, "disk"),
    "o_direct": lambda path: _directory(path, _direct, "o_direct"),
    "free_space": lambda path: _directory(path, _space, "free_space"),
    "memlock": _memlock,
    "open_files": _open_files,
    "file_size": _file_size,
    "checksum": _checksum,
    "torch": _torch,
    "gpu": _gpu,
    "gds": _gds,
}


def examine(path: str, only: Sequence[str] = ()) -> list[Finding]:
    """Look at this machine and at the directory `path`; `only` names the checks to make.

    Raises nothing about the machine: what is missing is a finding with `ok` false.
    """
    return [check(os.fspath(path)) for name, check in CHECKS.items() if not only or name in only]


def directory_problem(path: str) -> str | None:
    """Return why nothing can be spilled to the directory `path`; None where something can."""
    try:
        inspect_directory(os.fspath(path))
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def system_line() -> str:
    """Return kernel, processor count and Python in one line."""
    return (
        f"{platform.system()} {platform.release()}, {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}"
    )
