"""GPUDirect Storage: a GPU's bytes to a file and back without passing host memory, by kvikio."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import torch

__all__ = ["DirectFile", "KvikioFile", "direct_facts", "require_kvikio"]

_INSTALL = (
    "`pip install --no-deps kvikio-cu13 libkvikio-cu13 nvidia-cufile` and then "
    "`pip install cuda-pathfinder rapids-logger numpy packaging`"
)
_STATS = Path("/proc/driver/nvidia-fs/stats")
# Opening a file without a driver has been seen not to return.
_PROBE_TIMEOUT_S = 30.0


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

    kvikio's own way through host memory is refused: raises OSError where there is no direct one.
    """

    def __init__(self, descriptor: int) -> None:
        require_kvikio()
        kvikio = importlib.import_module("kvikio")  # not before somebody wants it
        self._path = f"/proc/self/fd/{descriptor}"
        try:
            with kvikio.defaults.set("compat_mode", kvikio.CompatMode.OFF):
                self._file: Any = kvikio.CuFile(self._path, "r+")
        except RuntimeError as error:
            raise OSError(f"{self._path} cannot be opened for GPUDirect Storage: {error}") from None

    def write(self, source: torch.Tensor, offset: int) -> int:
        """Write by cuFile."""
        try:
            return int(self._file.write(source, source.nbytes, offset))
        except RuntimeError as error:
            raise self._failed("write", source.nbytes, offset, error) from None

    def read(self, target: torch.Tensor, offset: int) -> int:
        """Read by cuFile."""
        try:
            return int(self._file.read(target, target.nbytes, offset))
        except RuntimeError as error:
            raise self._failed("read", target.nbytes, offset, error) from None

    def _failed(self, what: str, nbytes: int, offset: int, error: RuntimeError) -> OSError:
        return OSError(f"{what} of {nbytes} bytes at {offset} of {self._path} by cuFile: {error}")

    def close(self) -> None:
        """Deregister the file."""
        self._file.close()


def direct_facts(directory: str) -> tuple[bool, str]:
    """Say whether a GPU's bytes really go to files in `directory` directly, and how that is known.

    Tried out in a process of its own, which may hang or crash.
    """
    if importlib.util.find_spec("kvikio") is None:
        return False, f"kvikio is not installed ({_INSTALL}); bytes pass through host memory"
    if not torch.cuda.is_available():
        return False, "kvikio is here, but torch sees no GPU; bytes pass through host memory"
    try:
        before = _operations()
    except (OSError, ValueError):
        return False, f"{_STATS} cannot be read: the nvidia-fs driver is not loaded"
    command = [sys.executable, "-m", "offload.device.direct_probe", directory]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"trying it in {directory} did not end in {_PROBE_TIMEOUT_S:.0f} s"
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no reason was given"])[-1]
        return False, f"trying it in {directory} failed: {last}"
    if _operations() <= before:
        return (
            False,
            f"bytes came back, but the nvidia-fs driver counted no transfer to {directory}",
        )
    return True, f"{directory}: bytes came back, and the nvidia-fs driver counted their transfer"


def _operations() -> int:
    """Return how many reads and writes the driver has counted."""
    found = 0
    for line in _STATS.read_text().splitlines():
        if line.startswith(("Reads", "Writes")):
            found += int(line.split("n=")[1].split()[0])
    return found


def probe(directory: str) -> None:
    """Write a GPU's bytes to a nameless file in `directory` and read them back.

    Raises OSError or RuntimeError where that does not work.
    """
    size = 8 << 20
    descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
        file = KvikioFile(descriptor)
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        torch.cuda.synchronize()
        moved = file.write(source, 0), file.read(target, 0)
        file.close()
        if moved != (size, size) or not torch.equal(source, target):
            raise RuntimeError(f"{moved} of {size} bytes moved, and they are not the same")
    finally:
        os.close(descriptor)
