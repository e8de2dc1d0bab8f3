"""What goes to a directory's drive and back, by the way that activations take."""

from __future__ import annotations

import errno
import statistics
import time
from collections.abc import Callable

import torch

from offload.config import ActivationsConfig
from offload.native import Extent, inspect_directory
from offload.tiers.ssd import SsdTier
from perfmodel.machine import Drive

__all__ = ["measure_drive"]

_PIECE_BYTES = 8 << 20
_PIECES = 16
_STAGING_BYTES = 64 << 20


def measure_drive(path: str, rounds: int = 3) -> Drive:
    """Write, read and do both at once in `path`, `rounds` times; return the medians.

    Raises OSError with errno, message and path where `path` cannot be written to, or has no room
    for what is written: 256 MiB.
    """
    config = ActivationsConfig(tier="ssd", path=(path,), staging_bytes=_STAGING_BYTES)
    tier = SsdTier(config)
    try:
        found = [_Round(tier, path).rates() for _ in range(1 + rounds)][1:]
    finally:
        tier.close()
    write, read, mixed, processor = (statistics.median(each) for each in zip(*found, strict=True))
    return Drive(
        write_bytes_per_s=write,
        read_bytes_per_s=read,
        mixed_bytes_per_s=mixed,
        processor_bytes_per_s=processor,
        free_bytes=inspect_directory(path).free_bytes,
        path=path,
    )


class _Round:
    """Pieces that are written, read again, and written while others are read."""

    def __init__(self, tier: SsdTier, path: str) -> None:
        self._tier, self._path = tier, path
        self._source = torch.randint(256, (_PIECE_BYTES,), dtype=torch.uint8)
        self._written: list[Extent] = []

    def rates(self) -> tuple[float, float, float, float]:
        """Return bytes a second written, read, of both at once, and of a core's own time."""
        begin_cpu_s = time.process_time()
        write_s = self._seconds(self._write_all)
        read_s = self._seconds(self._read_all)
        mixed_s = self._seconds(self._both)
        cpu_s = max(1e-9, time.process_time() - begin_cpu_s)
        nbytes = _PIECE_BYTES * _PIECES
        self._written.clear()
        return nbytes / write_s, nbytes / read_s, 2 * nbytes / mixed_s, 4 * nbytes / cpu_s

    def _seconds(self, work: Callable[[], None]) -> float:
        begin_s = time.perf_counter()
        work()
        self._tier.drain()
        return max(1e-9, time.perf_counter() - begin_s)

    def _write(self) -> Extent:
        extent = self._tier.write(self._source.data_ptr(), _PIECE_BYTES)
        if extent is None:
            self._tier.raise_write_error()
            raise OSError(errno.ENOSPC, f"no room for {2 * _PIECES} pieces of 8 MiB", self._path)
        return extent

    def _write_all(self) -> None:
        self._written = [self._write() for _ in range(_PIECES)]

    def _read_all(self) -> None:
        ahead = 4
        for at, extent in enumerate(self._written):
            for other in self._written[at : at + ahead]:
                other.prefetch()
            extent.fetch()

    def _both(self) -> None:
        again = []
        for at, extent in enumerate(self._written):
            again.append(self._write())
            for other in self._written[at : at + 2]:
                other.prefetch()
            extent.fetch()
        self._written = again
