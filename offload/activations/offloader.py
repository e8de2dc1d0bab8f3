"""`ActivationOffload`: saved activations leave for the SSD in the forward and are back in time."""

from __future__ import annotations

import errno
import math
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from offload.activations.blocks import Running
from offload.activations.forward import ForwardPass
from offload.activations.ownership import foreign_process, lock_out_children
from offload.activations.region import Region
from offload.activations.saved import not_restorable, over_restored, over_storage
from offload.activations.schedule_book import ScheduleBook
from offload.activations.stats import ActivationStats, Counters, snapshot
from offload.config import ActivationsConfig
from offload.device import KERNEL_ALIGN, Restored, host_copy, materialise
from offload.native import DropBox, FaultPlan, SavedView, TryLock
from offload.tiers import SsdTier

__all__ = ["ActivationOffload"]

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
        ssd_write_bytes_per_day: int | None = None,
        keep_bytes: int | None = None,
        read_ahead_bytes: int | None = None,
        schedule: str = "auto",
        memory_bytes: int | None = None,
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
            ssd_write_bytes_per_day=ssd_write_bytes_per_day,
            keep_bytes=keep_bytes,
            read_ahead_bytes=read_ahead_bytes,
            schedule=schedule,
            memory_bytes=memory_bytes,
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
        self.flush = self._tier.flush
        # Joins the I/O threads when this object dies, at the interpreter's exit at the latest.
        self._finalizer = weakref.finalize(self, self._tier.close)
        self.process = os.getpid()
        lock_out_children(self)
        self.closed = self._close_later = False
        # Reentrant only so that it can say whether this thread holds it; see `close` and `settle`.
        self.lock: Any = threading.RLock()
        self.counters = Counters()
        self.forwards: set[ForwardPass] = set()  # with regions that somebody may want
        self.running = Running()
        # Views that autograd lets go of put their regions here, in any thread at any moment.
        self.dropped = DropBox(self.settle)
        self._ending: list[Region] = []  # without a view, and not freed yet
        self._said_full = False
        self._ahead_bytes, self._keep_bytes = 0, self.config.keep_bytes
        self.book = ScheduleBook(
            staging_bytes=self.config.staging_bytes,
            spill_bytes=self._tier.limit_bytes(),
            memory_bytes=self.config.memory_bytes,
            write_bytes_per_s=self._tier.write_bytes_per_s(),
            follow=self.config.schedule == "auto",
            stall_s=self._tier.stall_s,
        )
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

    def block(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`, a layer's output say, as one thing that may be computed again.

        Where `memory_bytes` is set and would not hold all that a forward saves, some of its blocks
        save only their `args`, and run again in the backward with the same random numbers.
        """
        forward = self.running.current()
        if forward is None or not torch.is_grad_enabled():
            return function(*args)
        return forward.blocks.run(forward, function, args)

    def stats(self) -> ActivationStats:
        """Return what has happened so far; cheap enough for every step.

        Raises RuntimeError in a forked child.
        """
        if self.process != os.getpid():
            raise foreign_process(self.process)
        self.settle()
        return snapshot(self.counters, self._tier.counters(), self._facts)

    def hint(self, *, next_backward: ForwardPass) -> None:
        """Say whose backward runs next, as a pipeline's scheduler knows.

        Of a forward still under way nothing leaves from now on; of one that has ended, reading
        begins.
        """
        if not isinstance(next_backward, ForwardPass):
            raise TypeError(f"next_backward={next_backward!r} is not what act.forward() returned")
        with self.lock:
            if next_backward.ended:
                next_backward.due = math.inf
                self._read_ahead(next_backward)
            else:
                next_backward.stays = True

    def close(self) -> None:
        """Drain the I/O, join its threads and free the space. Graphs still open become unusable.

        From a signal handler that interrupted a method of this object, closing begins when that
        method ends.
        """
        if self.process != os.getpid():
            return
        if self.lock._is_owned():
            self.closed = self._close_later = True
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

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        self.close()
        if kind is None and not self.book.forwards:
            said = "nothing was offloaded: no `with act.forward():` stood around any forward"
            warnings.warn(said, RuntimeWarning, stacklevel=2)

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
        begin, nbytes = region.begin, region.nbytes
        address = storage.data_ptr() + begin
        if region.on_host:
            extent = self._tier.write(address, nbytes)
        else:
            region.residue = address % KERNEL_ALIGN
            copy = host_copy(storage, begin, region.end)
            extent = self._tier.write(copy.data_ptr(), nbytes)
        if extent is None:
            self._keep(region)
            return
        region.extent = extent
        region.leave_memory()
        self.counters.offloaded += nbytes

    def _keep(self, region: Region) -> None:
        self._require_keeping(region.nbytes)
        self.counters.kept += region.nbytes
        self.counters.kept_now += region.nbytes
        region.kept = True

    def say_if_full(self) -> None:
        """Warn once that tensors stayed for want of space. Without `lock`."""
        if not self._said_full and self._tier.kept_total_bytes() + self.counters.kept:
            self._said_full = True
            warnings.warn(self._tier.why_full(), RuntimeWarning, stacklevel=3)

    def _require_keeping(self, nbytes: int) -> None:
        if (limit := self._keep_bytes) is None:
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
                    raise not_restorable(view, self.closed)
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

    def learn(self, forward: ForwardPass) -> None:
        """Remember how a whole backward went, and what the drive did meanwhile."""
        recording = forward.recording
        if recording is not None and not all(region.on_host for region in forward.regions):
            recording = None  # a GPU runs behind the clock of its host
        depth = max(1, forward.depth)
        self.book.learn(forward.signature, forward.used, recording, depth, forward.blocks)
        if self.book.follow:
            self.book.observe(*self._tier.transferred())

    # ---- the end of saved views ---------------------------------------------------------------

    def settle(self) -> None:
        """Free the regions of dropped views. Without `lock`; never waits for it.

        Called by every hook at its end, and soon after a view was dropped by the main thread, which
        may be inside a method that holds `lock`: then that method calls it again.
        """
        dropped, ending = self.dropped, self._ending
        while dropped or ending:
            with TryLock(self.lock) as taken:
                # A signal's handler may raise after any call, and what is done must stay done: what
                # stands between two calls here belongs together. (`taken` is asked here since
                # Python 3.11 leaves the `with` uncleaned if that happens on the way back to a loop
                # whose first instruction is the first of a block.)
                while taken and (dropped or ending):
                    if ending:
                        self._end(ending[-1])
                        continue
                    unread = dropped.unread
                    views = unread or dropped.read
                    # Any thread adds to them at any moment, but not between these two: nothing
                    # dies here, so nobody else runs.
                    region: Region | None = views[-1]
                    del views[-1]
                    assert region is not None
                    region.handles -= 1
                    if views is unread:
                        region.unread -= 1
                        if not region.unread:
                            region.restored = None
                    if not region.handles:
                        ending.append(region)
                    region = None
            if not taken:
                break
        if self._close_later and not self.lock._is_owned():
            self._close_later = False
            self.close()

    def _end(self, region: Region) -> None:
        """Free the last of those that are ending; may be called again after an interruption."""
        nbytes = region.end - region.begin
        if region.ahead:
            region.ahead = False
            self._ahead_bytes -= nbytes
        if region.kept:
            region.kept = False
            self.counters.kept_now -= nbytes
        region.free()
        forward: ForwardPass = region.forward
        if forward.recording is not None and self.process == os.getpid():
            forward.recording.released_s[region.number] = forward.recording.now_s()
        if forward.live == 1:
            forward.all_freed()
        forward.live -= 1
        del self._ending[-1]
