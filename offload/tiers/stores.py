"""The tiers that one instance was given, together."""

from __future__ import annotations

import math

from offload.config import ActivationsConfig
from offload.device import num_devices
from offload.native import Extent, FaultPlan
from offload.tiers.gds import DirectExtent
from offload.tiers.host import HostExtent, HostTier
from offload.tiers.memory import available_bytes
from offload.tiers.ssd import SsdTier, TierFacts

__all__ = ["Staged", "Store", "Stores"]

Staged = Extent | HostExtent | DirectExtent
"""One run of bytes in a tier."""
Store = SsdTier | HostTier
"""What `stage(nbytes, lead)` takes one to."""

# Of the memory that is available, where nobody says how much the host tier may take: a quarter, or
# a GPU's share of a half where there are several, with a rank each. All of it is pinned.
_HOST_PART = 4

_NO_SSD = TierFacts(
    io_engine="none",
    io_engine_reason="no tier 'ssd' was asked for",
    direct=False,
    direct_reason="no tier 'ssd' was asked for",
    registered_buffers=False,
    backing="none",
    verify=False,
)


class Stores:
    """Owns what `config.tier` asks for: the SSD's directories, host memory, or both.

    Raises OSError with errno, message and path when a directory cannot be used, MemoryError.
    """

    def __init__(self, config: ActivationsConfig, faults: FaultPlan | None = None) -> None:
        host_bytes = config.host_bytes
        if host_bytes is None:
            share = available_bytes() // max(_HOST_PART, 2 * num_devices())
            host_bytes = share if config.tier == "host" else 0
        self.host = HostTier(host_bytes) if host_bytes else None
        # The last, since it is the one that must be closed.
        self.ssd = SsdTier(config, faults) if config.tier == "ssd" else None
        self.path = config.path[0] if config.path else "host memory"

    def named(self) -> dict[str, Store]:
        """Return the tiers that there are, by name."""
        both = {"host": self.host, "ssd": self.ssd}
        return {name: store for name, store in both.items() if store is not None}

    def facts(self) -> TierFacts:
        """Say which path transfers to the SSD take."""
        return self.ssd.facts() if self.ssd is not None else _NO_SSD

    def kept_bytes(self) -> int:
        """Return how many live bytes are in memory because their write found the disk full."""
        return self.ssd.kept_bytes() if self.ssd is not None else 0

    def kept_total_bytes(self) -> int:
        """Return how many bytes have stayed in memory so far because their write found no space."""
        return self.ssd.kept_total_bytes() if self.ssd is not None else 0

    def why_full(self, unstaged_bytes: int = 0) -> str:
        """Say what stands in the way of more bytes, and that they stay where they are.

        `unstaged_bytes`: as for `in_the_way`.
        """
        return (
            f"{self.in_the_way(unstaged_bytes)}. From here on saved tensors that find no space "
            "stay in memory (stats().kept_bytes counts them); free space, or allow more"
        )

    def in_the_way(self, unstaged_bytes: int = 0) -> str:
        """Say what stands in the way of more bytes.

        `unstaged_bytes`: of the largest tensor that found no room in staging, if any.
        """
        reasons = []
        if unstaged_bytes and self.ssd is not None:
            staging = self.ssd.arena.nbytes
            reasons.append(
                f"a tensor of {unstaged_bytes} bytes found no room in staging_bytes={staging}, "
                "which must hold it in one piece; give more"
            )
        if self.host is not None:
            used, limit = self.host.stats()["used_bytes"], self.host.limit_bytes()
            reasons.append(f"host: {used} bytes are in use of at most {limit} (host_bytes)")
        if self.ssd is not None:
            reasons += self.ssd.why_full()
        return "; ".join(reasons)

    def flush(self) -> None:
        """Start the small writes that still wait for company."""
        if self.ssd is not None:
            self.ssd.flush()

    def drain(self) -> None:
        """Wait until no I/O is queued or in flight."""
        if self.ssd is not None:
            self.ssd.drain()

    def stall_s(self) -> float:
        """Return for how long callers have waited, for reads or for room in staging."""
        return self.ssd.stall_s() if self.ssd is not None else 0.0

    def write_bytes_per_s(self) -> float:
        """Return what may be written to the SSD without end; infinite without a limit."""
        return self.ssd.write_bytes_per_s() if self.ssd is not None else math.inf

    def limits(self) -> dict[str, float]:
        """Return how many bytes each tier may hold."""
        return {name: store.limit_bytes() for name, store in self.named().items()}

    def counters(self) -> dict[str, int | float]:
        """Return the counters of the SSD (zeros without one), and `host_*` of the host tier.

        `native_bytes` and `native_peak_bytes` are of all buffers together.
        """
        total: dict[str, int | float] = dict(SsdTier.NOTHING)
        if self.ssd is not None:
            total.update(self.ssd.counters())
        total["host_used_bytes"] = total["host_peak_used_bytes"] = 0
        if self.host is not None:
            stats = self.host.stats()
            for key in ("used_bytes", "peak_used_bytes"):
                total[f"host_{key}"] = stats[key]
            for key in ("native_bytes", "native_peak_bytes"):
                total[key] += stats[key]
        return total

    def close(self) -> None:
        """Wait for the I/O, join its threads and free the space."""
        try:
            if self.ssd is not None:
                self.ssd.close()
        finally:
            if self.host is not None:
                self.host.close()
