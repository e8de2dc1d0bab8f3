"""How much memory there is for staging, and an arena within it."""

from __future__ import annotations

import os
from pathlib import Path

from offload.native import Arena

__all__ = ["arena_of", "available_bytes"]


def available_bytes(root: Path = Path("/")) -> int:
    """Return how much memory the kernel could give this process without swapping.

    Within the limit of its control group (version 2), where it has one. `root`: of the system.
    """
    return min(_free_bytes(root), _allowed_bytes(root))


def _free_bytes(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _allowed_bytes(root: Path) -> int:
    """Return what is left of the limit of this process's group; those above it may have less."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        name = next(line[3:] for line in lines if line.startswith("0::"))
        group = root / "sys/fs/cgroup" / name.lstrip("/")
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        # Its page cache is given back when memory is asked for.
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    except (OSError, ValueError, StopIteration):
        return 1 << 62


def arena_of(nbytes: int, setting: str) -> Arena:
    """Return an arena of `nbytes`.

    Raises MemoryError, which names `setting`, where there is less memory now: the kernel promises
    what it has not got, and kills who then touches it.
    """
    there = available_bytes()
    try:
        if nbytes <= there:
            return Arena(nbytes)
    except MemoryError:
        pass
    raise MemoryError(
        f"{setting}={nbytes} is more memory than there is ({there} bytes are available); "
        "ask for less"
    ) from None
