"""`ActivationOffload`: saved activations leave for the SSD in the forward and are back in time."""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from types import TracebackType

import torch

from offload.activations.forward import ForwardPass
from offload.activations.region import Region
from offload.activations.saved import SavedView, changed_in_place
from offload.activations.stats import ActivationStats, Counters
from offload.config import ActivationsConfig
from offload.device import KERNEL_ALIGN, Restored, host_copy, materialise
from offload.native import FaultPlan
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
        self._process = os.getpid()
        self._closed = False
        self.lock = threading.Lock()
        self.counters = Counters()
        self.regions: dict[int, list[Region]] = {}
        self._dropped: deque[tuple[Region, bool]] = deque()
        self._orders: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()
        self._ahead_bytes = 0
        wanted = self.config.read_ahead_bytes
        self._read_ahead_bytes = self.config.staging_bytes // 2 if wanted is None else wanted
        self._read_batch_bytes = min(self._read_ahead_bytes // 2, _READ_BATCH_BYTES)

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
        facts = self._facts

        def whole(key: str) -> int:
            return int(native[key])

        return ActivationStats(
            offloaded_bytes=counts.offloaded,
            reloaded_bytes=counts.reloaded,
            forwarded_bytes=counts.forwarded,
            kept_bytes=counts.kept + whole("kept_total_bytes"),
            deduplicated_bytes=counts.deduplicated,
            recast_bytes=counts.recast,
            still_held_bytes=counts.still_held,
            passed_through_bytes=counts.frozen_passed_through(),
            stall_s=counts.read_stall_s + float(native["write_wait_s"]),
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
            io_engine=facts.io_engine,
            io_engine_reason=facts.io_engine_reason,
            direct=facts.direct,
            direct_reason=facts.direct_reason,
            registered_buffers=facts.registered_buffers,
            backing=facts.backing,
            verify=facts.verify,
        )

    def close(self) -> None:
        """Drain the I/O, join its threads and free the space. Graphs still open become unusable."""
        if self._process != os.getpid():
            return
        with self.lock:
            if self._closed:
                return
            self._closed = True
            for regions in self.regions.values():
                for region in regions:
                    region.free()
            self.regions.clear()
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
        if self._process != os.getpid():
            raise RuntimeError(
                f"this ActivationOffload belongs to process {self._process}; a forked child has to "
                "make its own"
            )
        if self._closed:
            raise RuntimeError("this ActivationOffload is closed; make a new one")

    def stage(self, region: Region) -> None:
        """Send a region out and let go of its memory, or keep it where the SSD is full."""
        self.check_open()
        self._tier.raise_write_error()
        self._require_keeping(0)
        if region.changed():
            return  # its backward will say so; there is no point in storing the wrong bytes
        if not region.has_memory():
            return  # emptied since by its owner, who may fill it again before the backward
        copy = host_copy(region.alias.untyped_storage(), region.begin, region.end)
        address = region.address() if copy is None else copy.data_ptr()
        extent = self._tier.write(address, region.nbytes)
        if extent is None:
            self._keep(region)
            return
        region.extent = extent
        region.residue = address % KERNEL_ALIGN if copy is None else region.address() % KERNEL_ALIGN
        region.leave_memory()
        self.counters.offloaded += region.nbytes

    def _keep(self, region: Region) -> None:
        self._require_keeping(region.nbytes)
        self.counters.kept += region.nbytes
        self.counters.kept_now += region.nbytes
        region.kept = True

    def flush(self) -> None:
        """Start whatever small writes still wait for company."""
        self._tier.flush()

    def wants_read_ahead(self) -> bool:
        """Say whether enough was used since the last reads to start a new batch of them."""
        return self._ahead_bytes <= self._read_ahead_bytes - self._read_batch_bytes

    def _require_keeping(self, nbytes: int) -> None:
        limit = self.config.keep_bytes
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

    def may_read_ahead(self) -> bool:
        """Say whether the bound on unasked reads leaves room."""
        return self._ahead_bytes < self._read_ahead_bytes

    def start_reading(self, region: Region) -> bool:
        """Begin reading a region back unasked; False when there is no room for it now."""
        over = self._ahead_bytes + region.nbytes > self._read_ahead_bytes
        if over and self._ahead_bytes:
            return False
        if region.extent is None or not region.extent.prefetch():
            return False
        region.ahead = True
        self._ahead_bytes += region.nbytes
        return True

    def restore(self, view: SavedView) -> torch.Tensor:
        """Return a saved tensor. Takes `lock`."""
        region = view.region
        with self.lock:
            if self._closed:
                raise RuntimeError(
                    "a saved activation is asked for after its ActivationOffload was closed; "
                    "close it after the last backward"
                )
            if region.changed():
                what = f"[{view.dtype} {list(view.size)}]"
                raise changed_in_place(what, region.alias._version, region.version)
            tensor = self._restore(view, region)
            if not view.read:
                view.read = True
                region.first_read()
        self.settle()
        return tensor

    def _restore(self, view: SavedView, region: Region) -> torch.Tensor:
        forward = region.forward
        if region.in_memory:
            storage: torch.UntypedStorage | None = region.alias.untyped_storage()
        else:
            storage = region.storage.alive()
        if region.in_memory and not region.has_memory():
            raise RuntimeError(
                f"a saved tensor [{view.dtype} {list(view.size)}] is asked for, but its storage "
                "was emptied before it was offloaded and not filled again"
            )
        if storage is not None and storage.nbytes() >= region.end:
            if not region.in_memory:
                self.counters.forwarded += region.nbytes
            forward.read_ahead(region)
            return view.over_storage(storage)
        restored = region.shared()
        if restored is None:
            self._tier.raise_write_error()
            restored = self._fetch(region)
        return view.over_restored(restored)

    def _fetch(self, region: Region) -> Restored:
        extent = region.extent
        assert extent is not None
        if not region.ahead:
            extent.prefetch()  # before everything that is only expected
        region.forward.read_ahead(region)
        if extent.ready():
            buffer = extent.fetch()
        else:
            begin = time.perf_counter()
            buffer = extent.fetch()
            self.counters.read_stall_s += time.perf_counter() - begin
        self._forget_ahead(region)
        restored = materialise(buffer, region.device, region.residue)
        region.share(restored)
        if buffer.forwarded:
            self.counters.forwarded += region.nbytes
        else:
            self.counters.reloaded += region.nbytes
        return restored

    def _forget_ahead(self, region: Region) -> None:
        if region.ahead:
            region.ahead = False
            self._ahead_bytes -= region.nbytes

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

    def dropped(self, region: Region, read: bool) -> None:
        """Note that autograd let go of a view. Called by its finalizer: any thread, any moment.

        That may be inside a method that holds `lock`, so it is put aside and taken care of at once
        if nobody holds the lock, otherwise by the next caller of `settle`.
        """
        self._dropped.append((region, read))
        self.settle()

    def settle(self) -> None:
        """Free the regions of dropped views. Without `lock`; never waits for it."""
        while self._dropped and self.lock.acquire(blocking=False):
            try:
                while self._dropped:
                    self._drop(*self._dropped.popleft())
            finally:
                self.lock.release()

    def _drop(self, region: Region, read: bool) -> None:
        if not read:
            region.first_read()
        region.handles -= 1
        if region.handles:
            return
        same_storage = self.regions.get(region.storage.key)
        if same_storage is not None:
            if region in same_storage:
                same_storage.remove(region)
            if not same_storage:
                del self.regions[region.storage.key]
        self._forget_ahead(region)
        if region.kept:
            region.kept = False
            self.counters.kept_now -= region.nbytes
        region.free()
        region.forward.region_freed()
