"""`ActivationOffload`: saved activations leave for the SSD in the forward and are back in time."""

from __future__ import annotations

import errno
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch

from offload.activations.forward import ForwardPass
from offload.activations.ownership import foreign_process, lock_out_children
from offload.activations.region import Region
from offload.activations.saved import changed_in_place, over_restored, over_storage
from offload.activations.stats import ActivationStats, Counters
from offload.config import ActivationsConfig
from offload.device import KERNEL_ALIGN, Restored, host_copy, materialise
from offload.native import FaultPlan, SavedView
from offload.tiers import SsdTier

__all__ = ["ActivationOffload"]

# How many shapes of forward (bucketed sequence lengths, say) the backward's order is kept for.
_REMEMBERED_ORDERS = 64
# Reads ahead start in batches, so that many small ones wake the I/O thread once.
_READ_BATCH_BYTES = 4 << 20


class ActivationOffload:
    """Keeps saved activations on the SSD between forward and backward.

    Parameters are those of `ActivationsConfig`, per rank; `path` is a directory on a local SSD, or
    several. Use as a context manager, or call `close()`. One instance serves one process; any
    number of forwards may be open or waiting for their backward.

    Raises ValueError for a wrong setting, OSError with errno and path for an unusable directory.
    While training: OSError when bytes were lost or damaged (never a wrong gradient), RuntimeError
    when a saved tensor was changed in place.
    """

    def __init__(
        self,
        tier: str = "ssd",
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
        *,
        min_tensor_bytes: int = 1 << 20,
        staging_bytes: int = 256 << 20,
        spill_bytes: int | None = None,
        keep_bytes: int | None = None,
        read_ahead_bytes: int | None = None,
        io_engine: str | FaultPlan = "auto",
        block_bytes: int = 1 << 20,
        queue_depth: int = 32,
        verify: bool = True,
        direct: bool = True,
        recast_parameters: bool = True,
    ) -> None:
        faults = io_engine if isinstance(io_engine, FaultPlan) else None
        self.config = ActivationsConfig(
            tier=tier,
            path=path,  # type: ignore[arg-type]  # the dataclass makes a tuple of strings of it
            min_tensor_bytes=min_tensor_bytes,
            staging_bytes=staging_bytes,
            spill_bytes=spill_bytes,
            keep_bytes=keep_bytes,
            read_ahead_bytes=read_ahead_bytes,
            io_engine="auto" if faults is not None else io_engine,  # type: ignore[arg-type]
            block_bytes=block_bytes,
            queue_depth=queue_depth,
            verify=verify,
            direct=direct,
            recast_parameters=recast_parameters,
        )
        if self.config.tier != "ssd":
            raise ValueError(
                f"tier={tier!r} saves nothing here: activations can go to tier 'ssd'; "
                "'host' needs a GPU, and 'device' is where they are already"
            )
        self._open(faults)

    def _open(self, faults: FaultPlan | None) -> None:
        self._tier = SsdTier(self.config, faults)
        self._facts = self._tier.facts()
        # Joins the I/O threads when this object dies, at the interpreter's exit at the latest.
        self._finalizer = weakref.finalize(self, self._tier.close)
        self.process = os.getpid()
        lock_out_children(self)
        self.closed = False
        # Reentrant only so that it can say whether this thread holds it; see `close` and `settle`.
        self.lock: Any = threading.RLock()
        self.counters = Counters()
        self.forwards: set[ForwardPass] = set()  # with regions that somebody may want
        # Regions of views that autograd let go of, and whether these had been asked for. Their
        # notices put them here, in any thread at any moment. No region: close.
        self.dropped: list[tuple[Region | None, bool]] = []
        self._orders: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()
        self._ahead_bytes = 0
        self._keep_bytes = self.config.keep_bytes
        wanted = self.config.read_ahead_bytes
        self._read_ahead_bytes = self.config.staging_bytes // 2 if wanted is None else wanted
        batch = min(self._read_ahead_bytes // 2, _READ_BATCH_BYTES)
        self._read_more_below = self._read_ahead_bytes - batch

    # ---- what users call --------------------------------------------------------------------

    def forward(self) -> ForwardPass:
        """Return the context for one micro-batch's forward; its backward runs after it.

        Raises RuntimeError on entry when closed, or inside a non-reentrant checkpoint.
        """
        self.check_open()
        return ForwardPass(self)

    def stats(self) -> ActivationStats:
        """Return what has happened so far; cheap enough for every step."""
        self.settle()
        native = self._tier.counters()
        counts = self.counters

        def whole(key: str) -> int:
            return int(native[key])

        return ActivationStats(
            offloaded_bytes=counts.offloaded,
            reloaded_bytes=whole("reloaded_bytes"),
            forwarded_bytes=counts.forwarded + whole("forwarded_bytes"),
            kept_bytes=counts.kept + whole("kept_total_bytes"),
            deduplicated_bytes=counts.deduplicated,
            recast_bytes=counts.recast,
            still_held_bytes=counts.still_held,
            passed_through_bytes=counts.frozen_passed_through(),
            stall_s=float(native["read_wait_s"]) + float(native["write_wait_s"]),
            ssd_write_bytes=whole("write_bytes"),
            ssd_read_bytes=whole("read_bytes"),
            native_bytes=whole("native_bytes"),
            native_peak_bytes=whole("native_peak_bytes"),
            staging_peak_bytes=whole("peak_used_bytes"),
            spill_bytes=whole("spill_used_bytes"),
            spill_peak_bytes=whole("spill_peak_used_bytes"),
            page_cache_bytes=whole("page_cache_bytes"),
            copy_s=float(native["copy_s"]),
            verify_s=float(native["verify_s"]),
            **asdict(self._facts),
        )

    def close(self) -> None:
        """Drain the I/O, join its threads and free the space. Graphs still open become unusable.

        From a signal handler that interrupted a method of this object, closing begins when that
        method ends.
        """
        if self.process != os.getpid():
            return
        if self.lock._is_owned():
            self.closed = True
            self.dropped.append((None, False))
            return
        with self.lock:
            self.closed = True
            for forward in self.forwards:
                for region in forward.regions:
                    region.free()
            self.forwards.clear()
        self._finalizer()

    def __enter__(self) -> ActivationOffload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- for the passes; `lock` is held where not said otherwise -----------------------------

    def check_open(self) -> None:
        """Raise RuntimeError in a closed instance or in a forked child. Without `lock`."""
        if self.process != os.getpid():
            raise foreign_process(self.process)
        if self.closed:
            raise RuntimeError("this ActivationOffload is closed; make a new one")

    def stage(self, region: Region) -> None:
        """Send a region out and let go of its memory, or keep it where the SSD is full.

        Raises OSError once an earlier write has failed, or when keeping would exceed its bound.
        """
        alias = region.alias
        if alias._version != region.version:
            return  # its backward will say so; there is no point in storing the wrong bytes
        storage = region.original()
        if storage is None:
            return  # emptied since by its owner, who may fill it again before the backward
        if self._keep_bytes is not None:
            self._require_keeping(0)
        begin = region.begin
        nbytes = region.end - begin
        if region.on_host:
            extent = self._tier.write(storage.data_ptr() + begin, nbytes)
        else:
            copy = host_copy(storage, begin, region.end)
            region.residue = (storage.data_ptr() + begin) % KERNEL_ALIGN
            extent = self._tier.write(copy.data_ptr(), nbytes)
        if extent is None:
            self._keep(region)
            return
        region.extent = extent
        region.leave_memory()
        self.counters.offloaded += nbytes

    def _keep(self, region: Region) -> None:
        self._require_keeping(region.nbytes)
        if not self.counters.kept:
            warnings.warn(
                f"{self._tier.why_full()}; from here on saved tensors that find no space stay in "
                "memory (stats().kept_bytes counts them)",
                RuntimeWarning,
                stacklevel=2,
            )
        self.counters.kept += region.nbytes
        self.counters.kept_now += region.nbytes
        region.kept = True

    def flush(self) -> None:
        """Start whatever small writes still wait for company."""
        self._tier.flush()

    def _require_keeping(self, nbytes: int) -> None:
        limit = self._keep_bytes
        if limit is None:
            return
        # What found no space when it was written is kept by the tier.
        kept = self.counters.kept_now + self._tier.kept_bytes() + nbytes
        if kept > limit:
            raise OSError(
                errno.ENOSPC,
                f"the spill is full, and keeping {kept} bytes in memory would exceed "
                f"keep_bytes={limit}; free space, raise spill_bytes or keep_bytes",
                self.config.path[0],
            )

    def restore(self, view: SavedView) -> torch.Tensor:
        """Return a saved tensor. Takes `lock`."""
        try:
            with self.lock:
                region: Region = view.region
                if self.closed or region.alias._version != region.version:
                    raise self._not_restorable(view, region)
                storage = region.original()
                if storage is not None:
                    tensor = self._forward_original(view, region, storage)
                else:
                    restored = region.restored
                    if restored is None:
                        restored = self._fetch(region, view.read)
                    tensor = over_restored(view, restored)
                if not view.read:
                    view.read = True
                    region.first_read()
                return tensor
        finally:
            if self.dropped:
                self.settle()

    def _not_restorable(self, view: SavedView, region: Region) -> RuntimeError:
        if self.closed:
            return RuntimeError(
                "a saved activation is asked for after its ActivationOffload was closed; "
                "close it after the last backward"
            )
        what = f"[{view.dtype} {list(view.size)}]"
        return changed_in_place(what, region.alias._version, region.version)

    def _forward_original(
        self, view: SavedView, region: Region, storage: torch.UntypedStorage
    ) -> torch.Tensor:
        if not region.in_memory:
            self.counters.forwarded += region.nbytes
        region.forward.want(region, view.read)
        self._read_ahead(region.forward)
        return over_storage(view, storage)

    def _fetch(self, region: Region, again: bool) -> Restored:
        forward = region.forward
        extent = region.extent
        if extent is None:
            raise RuntimeError(
                f"a saved tensor of {region.nbytes} bytes is asked for, but its storage was "
                "emptied before it was offloaded and not filled again"
            )
        forward.want(region, again)
        if region.ahead:
            region.ahead = False
            self._ahead_bytes -= region.nbytes
        else:
            extent.prefetch()  # before everything that is only expected
        if self._ahead_bytes <= self._read_more_below:
            self._read_ahead(forward)
        buffer = extent.fetch()
        restored = buffer if region.on_host else materialise(buffer, region.device, region.residue)
        # Kept until every saved view has asked once. No longer: a second backward over a retained
        # graph would hold everything.
        region.restored = restored if region.unread else None
        return restored

    def _read_ahead(self, forward: ForwardPass) -> None:
        """Start a batch of reads that the backward should want soon: one at least, if any."""
        limit = self._read_ahead_bytes
        if not limit:
            return
        began = False
        while self._ahead_bytes <= self._read_more_below or began:
            region = forward.next_to_read()
            if region is None or region.extent is None:
                break
            ahead = self._ahead_bytes + region.nbytes
            if (ahead > limit and self._ahead_bytes) or not region.extent.prefetch():
                break
            region.ahead = began = True
            self._ahead_bytes = ahead
            forward.cursor += 1
        if began:
            self._tier.flush()

    def learned_order(self, signature: tuple[int, ...]) -> list[int] | None:
        """Return the order in which the last such backward used its regions."""
        return self._orders.get(signature)

    def learn_order(self, signature: tuple[int, ...], order: list[int]) -> None:
        """Remember how a whole backward went."""
        self._orders[signature] = order
        self._orders.move_to_end(signature)
        if len(self._orders) > _REMEMBERED_ORDERS:
            self._orders.popitem(last=False)

    # ---- the end of saved views ---------------------------------------------------------------

    def settle(self) -> None:
        """Free the regions of dropped views. Without `lock`; never waits for it.

        Called by every hook at its end, and soon after a view was dropped by the main thread, which
        may be inside a method that holds `lock`: then that method calls it again.
        """
        lock = self.lock
        close = False
        while self.dropped and not lock._is_owned() and lock.acquire(False):
            try:
                while self.dropped:
                    region, read = self.dropped.pop()
                    if region is None:
                        close = True
                    else:
                        self._drop(region, read)
            finally:
                lock.release()
        if close:
            self.close()

    def _drop(self, region: Region, read: bool) -> None:
        if not read:
            region.first_read()
        region.handles -= 1
        if region.handles:
            return
        if region.ahead:
            region.ahead = False
            self._ahead_bytes -= region.nbytes
        if region.kept:
            region.kept = False
            self.counters.kept_now -= region.nbytes
        region.free()
        forward = region.forward
        forward.live -= 1
        if not forward.live:
            forward.all_freed()
