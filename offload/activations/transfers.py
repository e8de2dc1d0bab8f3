"""Regions out to their tier and back: what is sent, what is kept, what is read ahead."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Set
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from offload.activations.crossing import Crossing
from offload.activations.region import Region
from offload.activations.stats import Counters
from offload.config import ActivationsConfig
from offload.device import CudaLink, DeviceLink, Restored
from offload.tiers import DirectExtent, Staged, Stores

if TYPE_CHECKING:
    from offload.activations.backward import BackwardOrder
    from offload.activations.forward import ForwardPass

__all__ = ["Transfers"]

Totals = tuple[tuple[float, float], ...]
"""Bytes and busy seconds: out, in, and maybe of both while both were under way."""

# Reads ahead start in batches, so that many small ones wake the I/O thread once.
_READ_BATCH_BYTES = 4 << 20


class Transfers:
    """The traffic of one instance, whose lock guards it where not said otherwise."""

    def __init__(
        self,
        config: ActivationsConfig,
        stores: Stores,
        counters: Counters,
        lock: Any,
        forwards: Set[ForwardPass],
    ) -> None:
        self._stores = stores
        self._lock = lock
        self._counters = counters
        self._keep_bytes = config.keep_bytes
        self._memory_bytes = config.memory_bytes
        self._forwards = forwards
        self._said_full = False
        self.ahead_bytes = 0
        wanted = config.read_ahead_bytes
        self._read_ahead_bytes = config.staging_bytes // 2 if wanted is None else wanted
        # What a schedule has read by a moment fits into staging, beside all that is there.
        self._planned_ahead_bytes = config.staging_bytes if wanted is None else wanted
        self._window_bytes = config.device_window_bytes
        self._past_host = config.gds
        self._write = stores.ssd.write if stores.ssd is not None else None
        self.crossings: dict[torch.device, Crossing] = {}
        self._pinned_by: DeviceLink | None = None
        self._pinned: dict[int, bool] = {}  # by the address of an arena
        self.bound_memory()

    def crossing_over(self, link: DeviceLink) -> Crossing:
        """Return the traffic over `link`, to one device."""
        crossing = self.crossings.get(link.device)
        if crossing is None:
            self._open_direct_way(link)
            pinned = self._pin(link)
            crossing = Crossing(link, self._stores.named(), self._window_bytes, pinned)
            self.crossings[link.device] = crossing
            self.bound_memory()
            if self._stores.ssd is not None:
                self._stores.ssd.set_limit(self._stores.ssd.arena.nbytes)
        return crossing

    def _open_direct_way(self, link: DeviceLink) -> None:
        ssd = self._stores.ssd
        if not self._past_host or ssd is None:
            return
        if ssd.direct_way is not None:
            raise RuntimeError("gds=True serves one device in a process; make it a rank a device")
        ssd.open_direct_way(link)

    def _pin(self, link: DeviceLink) -> bool:
        """Pin all staging, once for all devices; say whether that worked."""
        if self._pinned_by is None:
            self._pinned_by = link
            for store in self._stores.named().values():
                arena = store.arena
                if store.direct_way is not None:
                    continue  # nothing goes through it
                self._pinned[arena.address] = done = link.pin(arena.address, arena.nbytes)
                if done:
                    arena.mark_resident()
        if not self._pinned:
            link.pinned_reason = "nothing is staged: all goes past host memory"
            return False
        link.pinned_reason = self._pinned_by.pinned_reason
        return all(self._pinned.values())

    def _unpin(self) -> None:
        if self._pinned_by is not None:
            for address in [address for address, done in self._pinned.items() if done]:
                del self._pinned[address]
                self._pinned_by.unpin(address)

    def crossing_to(self, device: torch.device) -> Crossing:
        """Return the traffic to a GPU."""
        crossing = self.crossings.get(device)
        return crossing if crossing is not None else self.crossing_over(CudaLink(device))

    # ---- out ----------------------------------------------------------------------------------

    def stage(self, region: Region, tier: str = "") -> None:
        """Send a region out and let go of its memory, or keep it where there is no space.

        `tier`: where to, or "" for wherever there is room. Raises OSError once an earlier write has
        failed, or when keeping would exceed its bound.
        """
        alias = region.alias
        if alias._version != region.version:
            return  # its backward will say so; there is no point in storing the wrong bytes
        storage = region.original()
        if storage is None:
            return  # emptied since by its owner, who may fill it again before the backward
        if self._keep_bytes is not None:
            self._require_keeping(0)
        nbytes = region.nbytes
        extent: Staged | None
        if region.crossing is not None:
            extent = region.crossing.send(region, storage, tier)
        else:
            assert self._write is not None
            extent = self._write(storage.data_ptr() + region.begin, nbytes)
        if extent is None:
            self._keep(region)
            return
        region.extent = extent
        region.leave_memory()
        self._counters.offloaded += nbytes

    def stay(self, region: Region) -> None:
        """Note that a region stays where it is, as its schedule says."""
        self._counters.planned_to_stay += region.nbytes
        # The first of a storage keeps all of it; the others are there with it.
        if region.storage not in region.forward.staying:
            region.forward.staying.add(region.storage)
            storage = region.original()
            region.stay_bytes = storage.nbytes() if storage is not None else region.nbytes
            self._counters.staying_now += region.stay_bytes
        if self._memory_bytes is None:
            return
        self.bound_memory()
        if region.crossing is not None:
            region.crossing.wait_within()
        elif self._stores.ssd is not None:
            self._stores.ssd.wait_within_limit()

    def bound_memory(self) -> None:
        """Leave to what is on its way what `memory_bytes` of each forward has beside what stays.

        A forward that saves faster than its way out takes it waits then, as its schedule says that
        it must. What crosses to a device is not in the device's memory while it is staged.
        """
        if self._memory_bytes is None:
            return
        stays = self._counters.staying_now + self._counters.kept_now
        # One whose backward is under way has no use for more than it has left.
        limits = [
            min(self._memory_bytes, forward.left_bytes)
            if forward.backward.used
            else self._memory_bytes
            for forward in self._forwards
        ]
        room = max(0, (sum(limits) if limits else self._memory_bytes) - stays)
        for crossing in self.crossings.values():
            crossing.room_bytes = room
        if self._stores.ssd is not None and not self.crossings:
            self._stores.ssd.set_limit(room)

    def _keep(self, region: Region) -> None:
        self._require_keeping(region.nbytes)
        self._counters.kept += region.nbytes
        self._counters.kept_now += region.nbytes
        region.kept = True
        self.bound_memory()

    def _require_keeping(self, nbytes: int) -> None:
        if (limit := self._keep_bytes) is None:
            return
        # What found no space when it was written is kept by the tier.
        kept = self._counters.kept_now + self._stores.kept_bytes() + nbytes
        if kept > limit:
            raise OSError(
                errno.ENOSPC,
                f"keeping {kept} bytes in memory would exceed keep_bytes={limit}, and they find no "
                f"other place: {self._stores.in_the_way()}; free space, or allow more",
                self._stores.path,
            )

    def say_if_full(self) -> None:
        """Warn once that tensors stayed for want of space. Without the lock."""
        if not self._said_full and self._stores.kept_total_bytes() + self._counters.kept:
            self._said_full = True
            unstaged = max((way.unstaged_bytes for way in self.crossings.values()), default=0)
            warnings.warn(self._stores.why_full(unstaged), RuntimeWarning, stacklevel=3)

    def flush(self) -> None:
        """Start the small writes that still wait for company."""
        self._stores.flush()

    # ---- back ---------------------------------------------------------------------------------

    def forwarded(self, region: Region, again: bool) -> None:
        """Note that a region is wanted that never left, or not yet."""
        forward = region.forward
        if not region.in_memory and not region.used:
            self._counters.forwarded += region.nbytes
        forward.backward.want(region, again, forward.recording)
        self.read_ahead(forward)
        if region.crossing is not None:
            self._bring_ahead(forward)

    def fetch(self, region: Region, again: bool) -> Restored:
        """Return a region's bytes, on their device; waits until they are there."""
        forward = region.forward
        extent = region.extent
        if extent is None:
            raise RuntimeError(
                f"a saved tensor of {region.nbytes} bytes is asked for, but its storage was "
                "emptied before it was offloaded and not filled again"
            )
        forward.backward.want(region, again, forward.recording)
        if region.ahead:
            self._not_ahead(region)
        elif region.arrival is None or region.arrival.copied is None:
            extent.prefetch()  # before everything that is only expected
        # By the plan nothing else is late: nothing begins beside what is waited for.
        alone = forward.backward.plan is not None and not extent.ready
        if not alone:
            self.read_ahead(forward)
        if region.crossing is None:
            assert not isinstance(extent, DirectExtent)  # which takes a device
            restored: Restored = extent.fetch()
        else:
            restored = region.crossing.bring(region)
        if alone:
            self.read_ahead(forward)
        if region.crossing is not None:
            self._bring_ahead(forward)
        # Kept until every saved view has asked once. No longer: a second backward over a retained
        # graph would hold everything.
        region.restored = restored if region.unread else None
        return restored

    def begin(self, forward: ForwardPass) -> None:
        """Have a backward's first regions come back before it begins."""
        self.read_ahead(forward)
        self._bring_ahead(forward)

    def read_ahead(self, forward: ForwardPass) -> None:
        """Start a batch of reads that the backward should want soon: one at least, if any.

        By a plan either those that are due, or where none is, some before their time.
        """
        backward = forward.backward
        planned = backward.plan is not None
        limit = self._planned_ahead_bytes if planned else self._read_ahead_bytes
        batch = min(limit // 2, _READ_BATCH_BYTES)
        began = False
        while limit and (self.ahead_bytes <= limit - batch or began):
            region = backward.next_to_read(self._room(backward))
            if region is None or region.extent is None:
                break
            if began and planned and region.position > backward.due:
                break  # or they would share the drive
            ahead = self.ahead_bytes + region.nbytes
            if (ahead > limit and self.ahead_bytes) or not region.extent.prefetch():
                break
            region.ahead = began = True
            self.ahead_bytes = ahead
        if began:
            self._stores.flush()

    def _room(self, backward: BackwardOrder) -> float:
        """Return how much of the staging that a schedule needs at its worst is not in use now.

        It stays touched, so that reading into it before the last moment costs no memory.
        """
        ssd = self._stores.ssd
        if backward.plan is None or ssd is None:
            return 0.0
        arena = ssd.arena
        return backward.plan.schedule.staging_peak_bytes - (arena.nbytes - arena.free_bytes)

    def _bring_ahead(self, forward: ForwardPass) -> None:
        """Have what is wanted soon come back to its device."""
        while (region := forward.backward.next_to_bring()) is not None:
            assert region.crossing is not None
            if not region.crossing.expect(region):
                break
        for crossing in self.crossings.values():
            for launched in crossing.go_on():
                self._not_ahead(launched)

    def _not_ahead(self, region: Region) -> None:
        if region.ahead:
            region.ahead = False
            self.ahead_bytes -= region.nbytes

    def forget(self, region: Region) -> None:
        """Take leave of a region that nobody wants any more."""
        self._not_ahead(region)
        if region.kept or region.stay_bytes:
            self._counters.kept_now -= region.nbytes * region.kept
            self._counters.staying_now -= region.stay_bytes
            region.kept, region.stay_bytes = False, 0
            self.bound_memory()
        region.free()

    def totals(self, crossing: Crossing | None) -> dict[str, Totals]:
        """Return what was moved to and from the SSD, and over the way to a device: see `Rates`."""
        totals: dict[str, Totals] = {}
        ssd = self._stores.ssd
        # Past host memory nothing takes the link, of which nothing is known then.
        if crossing is not None and (ssd is None or ssd.direct_way is None):
            # Of all links together: bytes and seconds add up to those of the average one.
            both = [way.link.transferred() for way in self.crossings.values()]
            totals["link"] = tuple(
                (sum(nbytes for nbytes, _ in way), sum(busy_s for _, busy_s in way))
                for way in zip(*both, strict=True)
            )
        if ssd is not None:
            totals["ssd"] = ssd.transferred()
        return totals

    def finish(self) -> None:
        """Let go of all that is still leaving: nobody waits for any backward."""
        for crossing in self.crossings.values():
            crossing.finish()

    def drain(self) -> None:
        """Wait until nothing is on its way. Without the lock."""
        for crossing in list(self.crossings.values()):
            crossing.drain()
            with self._lock:
                crossing.settle()
        self._stores.drain()

    def close(self) -> None:
        """Wait for the copies under way, then for the I/O, and free the space."""
        with ExitStack() as stack:  # all of them, whatever one of them raises; the last one first
            stack.callback(self._stores.close)
            stack.callback(self._unpin)
            for crossing in self.crossings.values():
                stack.callback(crossing.close)
