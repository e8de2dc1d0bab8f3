"""GPUDirect Storage: a GPU's bytes to a file and back without passing host memory, by kvikio."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import importlib.util
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from offload.native import close_in_children, keep_in_children

__all__ = ["DirectFile", "KvikioFile", "direct_facts", "require_direct"]

_INSTALL = (
    "`pip install --no-deps kvikio-cu13 libkvikio-cu13 nvidia-cufile` and then "
    "`pip install cuda-pathfinder rapids-logger numpy packaging`"
)
_STATS = Path("/proc/driver/nvidia-fs/stats")
# Opening a file without a driver has been seen not to return.
_PROBE_TIMEOUT_S = 30.0
# One write and one read at least.
_PROBE_OPERATIONS = 2
# The driver counts for the whole machine: nobody else may transfer for so long.
_IDLE_S, _IDLE_TRIES = 0.2, 20
# Ranks take turns, each of which may need its whole time.
_LOCK_TRIES = 16 * int(_PROBE_TIMEOUT_S / _IDLE_S)


class DirectFile(Protocol):
    """A file that a device's memory is written to and read from. Any thread, several at once."""

    def write(self, source: torch.Tensor, offset: int) -> int:
        """Write `source` (1-d, uint8) at `offset`; returns how many bytes, raises OSError."""

    def read(self, target: torch.Tensor, offset: int) -> int:
        """Fill `target` (1-d, uint8) from `offset` on; returns how many bytes, raises OSError."""

    def close(self) -> None:
        """Let go of the file."""


def require_kvikio() -> None:
    """Raise ImportError, naming what to install, where kvikio is missing."""
    if importlib.util.find_spec("kvikio") is None:
        raise ImportError(f"gds=True needs kvikio, which is not installed: {_INSTALL}")


class KvikioFile:
    """A file that is open here already, by its descriptor: it need not have a name.

    kvikio's own way through host memory is refused: raises OSError where it has no other. (cuFile
    may still have one of its own, which only `direct_facts` finds out.) Each transfer is one call
    of cuFile: kvikio's parallel ones add up what their pieces have moved, which does not tell where
    a short one ends, and go on with the others after one has failed.
    """

    def __init__(self, descriptor: int) -> None:
        require_kvikio()
        kvikio = importlib.import_module("kvikio")  # not before somebody wants it
        path = f"/proc/self/fd/{descriptor}"
        self._name = os.readlink(path)
        before = _descriptors_of(descriptor)
        try:
            with kvikio.defaults.set("compat_mode", kvikio.CompatMode.OFF):
                self._file: Any = kvikio.CuFile(path, "r+")
        except RuntimeError as error:
            said = f"cannot be opened for GPUDirect Storage: {error}"
            raise OSError(errno.ENOTSUP, said, self._name) from None
        # Of which a forked child would otherwise keep the file's space in use.
        self._opened = _descriptors_of(descriptor) - before
        for mine in self._opened:
            close_in_children(mine)

    def write(self, source: torch.Tensor, offset: int) -> int:
        """Write by cuFile."""
        return self._moved("write", self._file.raw_write, source, offset)

    def read(self, target: torch.Tensor, offset: int) -> int:
        """Read by cuFile."""
        return self._moved("read", self._file.raw_read, target, offset)

    def _moved(self, what: str, move: Any, tensor: torch.Tensor, offset: int) -> int:
        try:
            with torch.cuda.device(tensor.get_device()):  # each thread has a current one
                return int(move(tensor, tensor.nbytes, offset))
        except RuntimeError as error:
            said = f"{what} of {tensor.nbytes} bytes at {offset} by cuFile: {error}"
            raise OSError(errno.EIO, said, self._name) from None

    def close(self) -> None:
        """Deregister the file."""
        for mine in self._opened:
            keep_in_children(mine)
        self._file.close()


def _descriptors_of(descriptor: int) -> set[int]:
    """Return all of this process's descriptors of the file that `descriptor` is one of."""
    file, found = os.fstat(descriptor), set()
    for name in os.listdir("/proc/self/fd"):
        try:
            other = os.fstat(int(name))
        except OSError:
            continue  # closed meanwhile: the listing's own, at least
        if (other.st_dev, other.st_ino) == (file.st_dev, file.st_ino):
            found.add(int(name))
    return found


def require_direct(directories: Sequence[str]) -> None:
    """Raise OSError unless a GPU's bytes have been seen to go to each of `directories` directly.

    Raises ImportError, naming what to install, where kvikio is missing.
    """
    require_kvikio()
    for directory in directories:
        works, why = direct_facts(directory)
        if not works:
            raise OSError(errno.ENOTSUP, f"gds=True: {why}; leave it out there", directory)


def direct_facts(directory: str) -> tuple[bool, str]:
    """Say whether a GPU's bytes really go to files in `directory` directly, and how that is known.

    Tried out in a process of its own, which may hang or crash.
    """
    if importlib.util.find_spec("kvikio") is None:
        return False, f"kvikio is not installed ({_INSTALL}); bytes pass through host memory"
    if not torch.cuda.is_available():
        return False, "kvikio is here, but torch sees no GPU; bytes pass through host memory"
    try:
        turn = _turn()
    except TimeoutError:
        return False, "other ranks have been trying for too long"
    except OSError:
        return False, f"{_STATS} cannot be read: the nvidia-fs driver is not loaded"
    with turn:
        return _tried(directory)


def _tried(directory: str) -> tuple[bool, str]:
    others = "others keep transferring, and the nvidia-fs driver counts all together"
    try:
        before = _operations_when_idle()
    except TimeoutError:
        return False, others
    if before is None:
        said = "the nvidia-fs driver counts no transfers, so there is no telling"
        return False, f"{said}: load it with rw_stats_enabled=1"
    device = str(torch.cuda.current_device())
    command = [sys.executable, "-m", "offload.device.direct_probe", directory, device]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"trying it in {directory} did not end in {_PROBE_TIMEOUT_S:.0f} s"
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no reason was given"])[-1]
        return False, f"trying it in {directory} failed: {last}"
    after = _operations()
    time.sleep(_IDLE_S)
    if _operations() != after:  # who transfers now may have done so before
        return False, others
    if (after or 0) < before + _PROBE_OPERATIONS:
        return (
            False,
            f"bytes came back, but the nvidia-fs driver counted no transfer to {directory}",
        )
    return True, f"{directory}: bytes came back, and the nvidia-fs driver counted their transfer"


def _turn() -> IO[str]:
    """Return a file: while it is open no other rank tries, which would count this one's.

    Raises TimeoutError, or OSError where there is no driver.
    """
    stats = _STATS.open()
    for _ in range(_LOCK_TRIES):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(stats, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return stats
        time.sleep(_IDLE_S)
    stats.close()
    raise TimeoutError


def _operations_when_idle() -> int | None:
    """Return `_operations()` once they stand still; raises TimeoutError where they do not."""
    for _ in range(_IDLE_TRIES):
        before = _operations()
        time.sleep(_IDLE_S)
        if before is None or _operations() == before:
            return before
        time.sleep(random.SystemRandom().uniform(0, _IDLE_TRIES * _IDLE_S))
    raise TimeoutError


def _operations() -> int | None:
    """Return how many reads and writes the driver has counted; None where it does not count."""
    found = re.findall(r"^(?:Reads|Writes)\b.*?\bn=(\d+)", _STATS.read_text(), re.MULTILINE)
    return sum(map(int, found)) if found else None


def probe(directory: str, device: int) -> None:
    """Write the bytes of a GPU to a nameless file in `directory` and read them back.

    Raises OSError or RuntimeError where that does not work.
    """
    size = 8 << 20
    descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
        file = KvikioFile(descriptor)
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=f"cuda:{device}")
        target = torch.empty_like(source)
        torch.cuda.synchronize()
        moved = file.write(source, 0), file.read(target, 0)
        file.close()
        if moved != (size, size) or not torch.equal(source, target):
            raise RuntimeError(f"{moved} of {size} bytes moved, and they are not the same")
    finally:
        os.close(descriptor)
