"""The ssd tier: bytes out to nameless files in one or several directories, and back.

Knows addresses and extents, not tensors. One arena serves all directories, so its cap bounds the
staging of the whole tier.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

from offload.config import ActivationsConfig, OptimizerConfig
from offload.device import KERNEL_ALIGN, DeviceLink
from offload.native import Buffer, Extent, FaultPlan, Spill
from offload.tiers.gds import DirectExtent, DirectWay
from offload.tiers.memory import arena_of
from perfmodel.endurance import WriteBudget

__all__ = ["SsdTier", "TierFacts", "by_load"]

E = TypeVar("E", Extent, DirectExtent)
_PAGE_BYTES = 4096
_MEASURED_BYTES = 64 << 20  # of a directory, before its bandwidth counts


@dataclass(frozen=True)
class TierFacts:
    """The path that transfers take here, chosen once when the tier is opened."""

    io_engine: str
    io_engine_reason: str
    direct: bool
    direct_reason: str
    registered_buffers: bool
    backing: str
    verify: bool


def by_load(stats: Sequence[Mapping[str, int | float]]) -> list[int]:
    """Return the numbers of spills, the one first whose bytes take the least time to move.

    So each holds a share of the bytes by its bandwidth, once all of those have been measured.
    """
    moved = [int(each["read_bytes"] + each["write_bytes"]) for each in stats]
    # Reads and writes at once count once.
    busy_s = [each["read_busy_s"] + each["write_busy_s"] - each["mixed_busy_s"] for each in stats]
    speeds = [1.0] * len(stats)
    if min(moved) >= _MEASURED_BYTES and min(busy_s) > 0:
        speeds = [nbytes / seconds for nbytes, seconds in zip(moved, busy_s, strict=True)]
    loads = [each["used_bytes"] / speed for each, speed in zip(stats, speeds, strict=True)]
    return sorted(range(len(stats)), key=loads.__getitem__)


class SsdTier:
    """Spills byte ranges to `config.path` and reads them back.

    Owns the staging arena, the spill files and their I/O threads. Calls may come from any thread.

    Raises OSError with errno, message and path when a directory cannot be used.
    """

    NOTHING: Mapping[str, int | float] = dict.fromkeys(
        (
            *("reloaded_bytes", "forwarded_bytes", "kept_bytes", "kept_total_bytes"),
            *("write_bytes", "read_bytes", "write_wait_s", "read_wait_s", "copy_s", "verify_s"),
            *("native_bytes", "native_peak_bytes", "peak_used_bytes", "spill_used_bytes"),
            *("spill_peak_used_bytes", "page_cache_bytes", "open_s"),
            "drive_write_bytes",
        ),
        0,
    )
    """The counters that are asked for, where there is no SSD."""

    def __init__(
        self, config: ActivationsConfig | OptimizerConfig, faults: FaultPlan | None = None
    ) -> None:
        self._process = os.getpid()
        self._opened_s = monotonic()
        self._closed_s: float | None = None
        self.arena = arena_of(config.staging_bytes, "staging_bytes")
        self._spills: list[Spill] = []
        self._drives: list[int] = []  # the device number of each one's file system
        self._verify = config.verify
        self.direct_way: DirectWay | None = None
        """Past host memory, once somebody has opened it."""
        self._path = config.path
        self._spill_bytes = config.spill_bytes
        self._budgets: dict[Spill, WriteBudget] = {}
        self._refused_bytes = 0
        try:
            for directory in config.path:
                self._open_spill(directory, config, faults)
        except BaseException:
            self.close()
            raise
        if config.ssd_write_bytes_per_day is not None:
            for spill in self._spills:
                self._budgets[spill] = WriteBudget(config.ssd_write_bytes_per_day, monotonic())
        only = self._spills[0] if len(self._spills) == 1 and not self._budgets else None
        self.write: Callable[[int, int], Extent | None]
        """`write(address, nbytes)` copies bytes into staging and starts writing them.

        The memory is the caller's again on return. Waits while staging is full. Returns None when
        no directory has space or may be written to; raises OSError once an earlier write failed.
        """
        self.write = only.write if only is not None else self._write_in_turn

    def _open_spill(
        self, directory: str, config: ActivationsConfig | OptimizerConfig, faults: FaultPlan | None
    ) -> None:
        spill = Spill(
            directory,
            self.arena,
            engine=config.io_engine,
            queue_depth=config.queue_depth,
            block_bytes=config.block_bytes,
            spill_bytes=config.spill_bytes or 0,
            verify=self._verify,
            direct=config.direct,
            fault_plan=faults,
        )
        self._spills.append(spill)
        self._drives.append(os.fstat(spill.fileno()).st_dev)
        if spill.backing == "memory":
            said = f"{directory} is in RAM ({spill.filesystem}), where nothing is saved"
            warnings.warn(f"{said}; name a directory on an SSD", RuntimeWarning, stacklevel=6)

    def _in_turn(self) -> Iterator[Spill]:
        """Yield every directory's spill, the least busy one first: see `by_load`."""
        if len(self._spills) == 1:
            yield self._spills[0]
            return
        stats = [spill.stats() for spill in self._spills]
        yield from (self._spills[number] for number in by_load(stats))

    def _write_in_turn(self, address: int, nbytes: int) -> Extent | None:
        return self._first_of(
            nbytes, address % KERNEL_ALIGN, lambda spill: spill.write(address, nbytes)
        )

    def _first_of(self, nbytes: int, lead: int, take: Callable[[Spill], E | None]) -> E | None:
        """Return what the first directory gives that has space and may be written to."""
        whole = -(-(lead + nbytes) // _PAGE_BYTES) * _PAGE_BYTES  # with what pads it
        refused = False
        for spill in self._in_turn():
            budget = self._budgets.get(spill)
            if budget is not None and not budget.allow(whole, monotonic()):
                refused = True
                continue
            extent = None
            try:
                extent = take(spill)
            finally:
                if extent is None and budget is not None:
                    budget.give_back(whole)
            if extent is not None:
                return extent
        self._refused_bytes += nbytes * refused
        return None

    def stage(self, nbytes: int, lead: int) -> Extent | DirectExtent | None:
        """Return an extent with room in staging, at an address equal to `lead` modulo 64.

        Its bytes are put where `staged()` says, and then `start_write()` sends them on. Where there
        is a direct way, an extent that the device writes itself. Otherwise as `write`.
        """
        way = self.direct_way
        if way is None:
            return self._first_of(nbytes, lead, lambda spill: spill.stage(nbytes, lead))
        return self._first_of(nbytes, 0, lambda spill: way.reserve(spill, nbytes))

    def restage(self, buffer: Buffer) -> Extent | None:
        """Return an extent for bytes that were fetched and are changed where they are.

        They stay there, and `start_write()` sends them on. Otherwise as `write`, but never waits.
        """
        lead = buffer.address % KERNEL_ALIGN
        return self._first_of(buffer.nbytes, lead, lambda spill: spill.restage(buffer))

    def open_direct_way(self, link: DeviceLink) -> None:
        """Have `link`'s device reach the files itself from now on.

        Raises OSError or ImportError where it cannot.
        """
        with ExitStack() as opened:
            files = {}
            for spill in self._spills:
                files[spill] = link.direct_file(spill.fileno())
                opened.callback(files[spill].close)
            opened.pop_all()
        self.direct_way = DirectWay(files)

    def write_bytes_per_s(self) -> float:
        """Return what may be written without end; infinite without a limit."""
        if not self._budgets:
            return math.inf
        return sum(budget.bytes_per_s for budget in self._budgets.values())

    def raise_write_error(self) -> None:
        """Raise the OSError of the first write that failed for another reason than a full disk."""
        for spill in self._spills:
            spill.raise_write_error()
        if self.direct_way is not None:
            self.direct_way.raise_error()

    def kept_bytes(self) -> int:
        """Return how many live bytes are in memory because their write found the disk full."""
        return sum(int(spill.stats()["kept_bytes"]) for spill in self._spills)

    def why_full(self) -> list[str]:
        """Say, directory by directory, what stands in the way of more bytes."""
        bound = "spill_bytes" if self._spill_bytes else "half of what was free at the start"
        reasons = []
        for path, spill in zip(self._path, self._spills, strict=True):
            counters = spill.stats()
            reasons.append(
                f"{path}: {counters['used_bytes']} bytes are in use of at most "
                f"{counters['limit_bytes']} ({bound}), and {spill.free_bytes} are free on the drive"
            )
        if self._refused_bytes:
            reasons.append(
                "ssd_write_bytes_per_day lets no more through yet: a 24th of it may be written at "
                "once, and the rest evenly over the day"
            )
        return reasons

    def set_limit(self, nbytes: int) -> None:
        """Hold staging to `nbytes` from now on, or to one tensor if that is larger."""
        self.arena.set_limit(nbytes)

    def wait_within_limit(self) -> None:
        """Return when staging is within its limit, or nothing is on its way out of it."""
        self._spills[0].wait_within_limit()

    def flush(self) -> None:
        """Start the small writes that still wait for company."""
        for spill in self._spills:
            spill.flush()

    def forget_write_errors(self) -> None:
        """Go on after writes that have failed, whose bytes their owner has kept."""
        for spill in self._spills:
            spill.forget_write_error()

    def drain(self) -> None:
        """Wait until nothing is queued or in flight."""
        for spill in self._spills:
            spill.drain()
        if self.direct_way is not None:
            self.direct_way.drain()

    def close(self) -> None:
        """Cancel what has not begun, wait for the rest, and join the I/O threads. Idempotent."""
        if self._process != os.getpid():
            return  # a forked child, on its way out, has no part in its parent's files
        if self._closed_s is None:
            self._closed_s = monotonic()
        with ExitStack() as stack:  # all of them, whatever one of them raises
            for spill in self._spills:
                stack.callback(spill.close)
            if self.direct_way is not None:
                stack.callback(self.direct_way.close)  # the first to be called

    def facts(self) -> TierFacts:
        """Say which path transfers take; where directories differ, the weaker one counts."""
        first = self._spills[0]
        weakest = next((spill for spill in self._spills if not spill.direct), first)
        in_memory = any(spill.backing == "memory" for spill in self._spills)
        past_host = self.direct_way is not None
        return TierFacts(
            io_engine="gds" if past_host else first.engine,
            io_engine_reason="asked for" if past_host else first.engine_reason,
            direct=weakest.direct,
            direct_reason=weakest.direct_reason,
            registered_buffers=all(spill.registered for spill in self._spills),
            backing="memory" if in_memory else first.backing,
            verify=self._verify and not past_host,
        )

    def kept_total_bytes(self) -> int:
        """Return how many bytes have stayed in memory so far because their write found no space."""
        return sum(int(spill.stats()["kept_total_bytes"]) for spill in self._spills)

    def stall_s(self) -> float:
        """Return for how long callers have waited, for reads or for room in staging."""
        way = self.direct_way
        direct_s = way.reads.wait_s + way.writes.wait_s if way is not None else 0.0
        return sum(spill.stall_s for spill in self._spills) + direct_s

    def limit_bytes(self) -> int:
        """Return how many bytes all directories together may hold."""
        return sum(int(spill.stats()["limit_bytes"]) for spill in self._spills)

    def transferred(self) -> tuple[tuple[float, float], ...]:
        """Return what was written, what was read, and what of both while both were under way.

        Of each its bytes, and busy seconds of the average directory.
        """
        ways = ("write", "read", "mixed")
        keys = [f"{way}_{what}" for way in ways for what in ("bytes", "busy_s")]
        sums = [0.0] * len(keys)
        for spill in self._spills:
            stats = spill.stats()
            for at, key in enumerate(keys):
                sums[at] += stats[key] / (len(self._spills) if key.endswith("_s") else 1)
        if self.direct_way is not None:  # whose transfers take turns, whatever their directory
            for at, lane in enumerate((self.direct_way.writes, self.direct_way.reads)):
                sums[2 * at] += lane.nbytes
                sums[2 * at + 1] += lane.busy_s
        return tuple(zip(sums[::2], sums[1::2], strict=True))

    def _written_by_drive(self) -> dict[int, int]:
        written: dict[int, int] = {}
        for spill, drive in zip(self._spills, self._drives, strict=True):
            direct = self.direct_way.written[spill] if self.direct_way is not None else 0
            ours = int(spill.stats()["write_bytes"]) + direct
            written[drive] = written.get(drive, 0) + ours
        return written

    def counters(self) -> dict[str, int | float]:
        """Return the sums of all directories' counters and the arena's (`*_bytes`, `*_s`).

        And `open_s`, for how long there has been somebody to write; `drive_write_bytes`, of the
        file system that was written most.
        """
        total: dict[str, int | float] = dict(self.arena.stats())
        for spill in self._spills:
            for key, value in spill.stats().items():
                # The arena's own "used_bytes" and the spills' must not be added to each other.
                name = f"spill_{key}" if key in ("used_bytes", "peak_used_bytes") else key
                total[name] = total.get(name, 0) + value
        if self.direct_way is not None:
            for key, value in self.direct_way.counters().items():
                total[key] += value
        total["open_s"] = (self._closed_s or monotonic()) - self._opened_s
        total["drive_write_bytes"] = max(self._written_by_drive().values(), default=0)
        total["page_cache_bytes"] = sum(spill.page_cache_bytes() for spill in self._spills)
        return total
