"""What happened to saved activations, in bytes and seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType

from offload.config import ActivationsConfig
from offload.tiers import TierFacts
from perfmodel.endurance import DAY_S, life_days

__all__ = ["ActivationStats", "Counters", "LinkFacts", "snapshot"]


@dataclass(frozen=True, kw_only=True)
class LinkFacts:
    """The way between a device and host memory."""

    device: str
    pinned: bool
    pinned_reason: str
    device_numa_node: int
    """-1 where the system does not tell."""
    staging_numa_nodes: Mapping[str, int]
    """Of each tier's host memory. Copies from another node than the device's are slower."""


@dataclass(frozen=True, kw_only=True)
class ActivationStats:
    """A snapshot of `ActivationOffload.stats()`; byte counts are totals unless said otherwise."""

    offloaded_bytes: int
    """Sent to the SSD or the host, once a storage region."""
    reloaded_bytes: int
    """Read back for a backward."""
    forwarded_bytes: int
    """Handed back without a read: the tensor or its staging copy was still there."""
    kept_bytes: int
    """Left in memory because the SSD had no space, or no writes left for today."""
    scheduled_to_stay_bytes: int
    """Left in memory because the schedule says so."""
    recomputed_blocks: int
    """Calls of `act.block` that saved only what entered them, to be run again."""
    predicted_peak_bytes: int
    """Of the last forward that followed a schedule: saved tensors at the worst moment; or 0."""
    predicted_slowdown: float
    """How much longer, as a part of it, its step is expected to be by waiting; or 0."""
    planning_s: float
    """Seconds the training thread has chosen schedules: in a few of the first steps of each kind of
    forward, and where a drive has become another."""
    deduplicated_bytes: int
    """Saved again by another operator or view, and not written again."""
    recast_bytes: int
    """Low-precision copies of parameters, made again for the backward instead of stored."""
    still_held_bytes: int
    """Offloaded, yet still held by someone else when their forward ended: nothing was saved."""
    passed_through_bytes: Mapping[str, int]
    """Left alone, by reason."""
    stall_s: float
    """Seconds the training thread waited, for a read or for room in staging."""
    ssd_write_bytes: int
    ssd_write_bytes_a_day: float
    """In a day that goes on like the time since the start, pauses included; by this process, to all
    directories."""
    ssd_life_days: float | None
    """How long the drive that is written most would last from new on, if nobody but this process
    went on writing to it so; infinite if nothing is written, None without `ssd_rated_bytes`.
    Directories on one file system are one drive."""
    ssd_read_bytes: int
    native_bytes: int
    """Every native buffer now: the arena as far as it was touched, and what lies outside of it."""
    native_peak_bytes: int
    staging_peak_bytes: int
    """The most of the arena that was in use at once."""
    spill_bytes: int
    """Live in the spill files at this moment."""
    spill_peak_bytes: int
    host_bytes: int
    """Live in the host tier at this moment."""
    host_peak_bytes: int
    page_cache_bytes: int
    """Pages of the spill files in the page cache: 0 where O_DIRECT works."""
    copy_s: float
    """CPU seconds copying into staging and checksumming."""
    verify_s: float
    """CPU seconds comparing checksums."""
    io_engine: str
    io_engine_reason: str
    direct: bool
    direct_reason: str
    registered_buffers: bool
    backing: str
    """`disk`, or `memory` where the directory is in RAM and nothing is saved."""
    verify: bool
    links: tuple[LinkFacts, ...]
    """One for each device that tensors have left; none where they are in host memory."""


@dataclass
class Counters:
    """The counts that Python keeps while training; native code keeps the others."""

    any_large: bool = False
    offloaded: int = 0
    forwarded: int = 0
    kept: int = 0
    kept_now: int = 0
    planned_to_stay: int = 0
    staying_now: int = 0
    recomputed_blocks: int = 0
    predicted_peak: int = 0
    predicted_slowdown: float = 0.0
    deduplicated: int = 0
    recast: int = 0
    still_held: int = 0
    held_s: float = 0.0  # for how long devices have waited for copies, when last asked
    passed_through: dict[str, int] = field(default_factory=dict)

    def frozen_passed_through(self) -> Mapping[str, int]:
        """Return a read-only copy of the bytes passed through, by reason."""
        return MappingProxyType(dict(self.passed_through))


def snapshot(
    counts: Counters,
    native: Mapping[str, int | float],
    facts: TierFacts,
    config: ActivationsConfig,
    links: tuple[LinkFacts, ...] = (),
    planning_s: float = 0.0,
) -> ActivationStats:
    """Return what both sides have counted, and the path that transfers take."""

    def whole(key: str) -> int:
        return int(native[key])

    open_s = float(native["open_s"])
    a_day, drive_a_day = (
        whole(key) / open_s * DAY_S if open_s else 0.0
        for key in ("write_bytes", "drive_write_bytes")
    )
    return ActivationStats(
        offloaded_bytes=counts.offloaded,
        reloaded_bytes=whole("reloaded_bytes"),
        forwarded_bytes=counts.forwarded + whole("forwarded_bytes"),
        kept_bytes=counts.kept + whole("kept_total_bytes"),
        scheduled_to_stay_bytes=counts.planned_to_stay,
        recomputed_blocks=counts.recomputed_blocks,
        predicted_peak_bytes=counts.predicted_peak,
        predicted_slowdown=counts.predicted_slowdown,
        planning_s=planning_s,
        deduplicated_bytes=counts.deduplicated,
        recast_bytes=counts.recast,
        still_held_bytes=counts.still_held,
        passed_through_bytes=counts.frozen_passed_through(),
        stall_s=sum(map(float, (native["read_wait_s"], native["write_wait_s"], counts.held_s))),
        ssd_write_bytes=whole("write_bytes"),
        ssd_write_bytes_a_day=a_day,
        ssd_life_days=_life_days(config, drive_a_day),
        ssd_read_bytes=whole("read_bytes"),
        native_bytes=whole("native_bytes"),
        native_peak_bytes=whole("native_peak_bytes"),
        staging_peak_bytes=whole("peak_used_bytes"),
        spill_bytes=whole("spill_used_bytes"),
        spill_peak_bytes=whole("spill_peak_used_bytes"),
        host_bytes=whole("host_used_bytes"),
        host_peak_bytes=whole("host_peak_used_bytes"),
        page_cache_bytes=whole("page_cache_bytes"),
        copy_s=float(native["copy_s"]),
        verify_s=float(native["verify_s"]),
        links=links,
        **asdict(facts),
    )


def _life_days(config: ActivationsConfig, written_a_day: float) -> float | None:
    if config.ssd_rated_bytes is None:
        return None
    return life_days(
        written_a_day, config.ssd_rated_bytes, write_amplification=config.ssd_write_amplification
    )
