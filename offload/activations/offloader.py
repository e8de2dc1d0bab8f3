"""`ActivationOffload`: saved activations leave for the SSD in the forward and are back in time."""

from __future__ import annotations

import math
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from offload.activations.blocks import Running
from offload.activations.crossing import Crossing
from offload.activations.forward import ForwardPass
from offload.activations.identity import inside_recomputing_checkpoint
from offload.activations.ownership import foreign_process, lock_out_children
from offload.activations.region import Region
from offload.activations.saved import not_restorable, over_restored, over_storage
from offload.activations.schedule_book import ScheduleBook
from offload.activations.stats import ActivationStats, Counters, snapshot
from offload.activations.transfers import Transfers
from offload.activations.uncompiled import uncompiled
from offload.config import ActivationsConfig
from offload.device import EmulatedLink, has_gpu, require_direct
from offload.native import DropBox, FaultPlan, SavedView, TryLock
from offload.tiers import Stores
from perfmodel.plan import require_known

__all__ = ["ActivationOffload"]

# What a defect of ours would raise; what a signal's handler raises is not to be lost.
_MISTAKES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
SETTINGS = frozenset(field.name for field in fields(ActivationsConfig))


def note_modules(running: Running) -> Callable[[torch.nn.Module, object], None]:
    """Return the hook of all modules that tells a forward of the ones it runs.

    One for an instance's whole life: code that was compiled under one hook is compiled anew under
    another.
    """

    @uncompiled
    def note(module: torch.nn.Module, _args: object) -> None:
        if torch.compiler.is_compiling():
            return  # what is traced would run once, and be guarded by all that it looks at
        forward = running.current()
        if forward is not None:
            forward.note_module(module)

    return note


def end(module_hook: RemovableHandle, transfers: Transfers) -> None:
    """Leave nothing behind of an instance."""
    module_hook.remove()
    transfers.close()


def require_useful(config: ActivationsConfig, emulated_device: EmulatedLink | None) -> None:
    """Raise ValueError where what `config` asks for would save nothing.

    With `gds`, ImportError without kvikio, and OSError where the direct way cannot be had.
    """
    tier, on_device = config.tier, has_gpu() or emulated_device is not None
    if config.gds and not on_device:
        raise ValueError("gds=True leads from a GPU to the SSD, and torch sees no GPU here")
    if config.gds and emulated_device is None:
        require_direct(config.path)
    if tier == "device" or (tier == "host" and not on_device):
        raise ValueError(
            f"tier={tier!r} saves nothing here: activations can go to tier 'ssd'; "
            "'host' needs a GPU, and 'device' is where they are already"
        )


class ActivationOffload:
    """Keeps saved activations on the SSD, or a GPU's on the host, between forward and backward.

    Parameters are those of `ActivationsConfig`, per rank; `path` is a directory on a local SSD, or
    several. `emulated_device` has tensors of the CPU treated as if they lay on a device. Use as a
    context manager, or call `close()`. One instance serves one process; any number of forwards may
    be open or waiting for their backward.

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
        host_bytes: int | None = None,
        device_window_bytes: int | None = None,
        spill_bytes: int | None = None,
        ssd_write_bytes_per_day: int | None = None,
        keep_bytes: int | None = None,
        read_ahead_bytes: int | None = None,
        schedule: str = "auto",
        memory_bytes: int | None = None,
        tolerated_slowdown: float = 0.0,
        ssd_rated_bytes: int | None = None,
        ssd_write_amplification: float = 1.0,
        io_engine: str | FaultPlan = "auto",
        block_bytes: int = 1 << 20,
        queue_depth: int = 32,
        verify: bool = True,
        direct: bool = True,
        gds: bool = False,
        recast_parameters: bool = True,
        emulated_device: EmulatedLink | None = None,
        **unknown: NoReturn,
    ) -> None:
        require_known("ActivationOffload", unknown, sorted((*SETTINGS, "emulated_device")))
        # Named as the settings are, each of them.
        settings = {key: value for key, value in locals().items() if key in SETTINGS}
        faults = io_engine if isinstance(io_engine, FaultPlan) else None
        if faults is not None:
            settings["io_engine"] = "auto"
        self.config = ActivationsConfig(**settings)
        require_useful(self.config, emulated_device)
        self._open(faults, emulated_device)

    def _open(self, faults: FaultPlan | None, emulated_device: EmulatedLink | None) -> None:
        self._stores = Stores(self.config, faults)
        self.counters = Counters()
        # Reentrant only so that it can say whether this thread holds it; see `close` and `settle`.
        self.lock: Any = threading.RLock()
        self.forwards: set[ForwardPass] = set()  # with regions that somebody may want
        self.transfers = Transfers(
            self.config, self._stores, self.counters, self.lock, self.forwards
        )
        # What is in host memory gains nothing from going to host memory.
        self.stays_on_host = self.config.tier == "host" and emulated_device is None
        self._emulated = (
            self.transfers.crossing_over(emulated_device) if emulated_device is not None else None
        )
        self.running = Running()
        # Joins the I/O threads when this object dies, at the interpreter's exit at the latest.
        module_hook = register_module_forward_pre_hook(note_modules(self.running))
        self._finalizer = weakref.finalize(self, end, module_hook, self.transfers)
        self.process = os.getpid()
        lock_out_children(self)
        self.closed = self._close_later = False
        # Views that autograd lets go of put their regions here, in any thread at any moment.
        self.dropped = DropBox(self.settle)
        self._ending: list[Region] = []  # without a view, and not freed yet
        self.book = ScheduleBook(
            staging_bytes=self.config.staging_bytes,
            tier_bytes=self._stores.limits(),
            window_bytes=self.config.device_window_bytes,
            memory_bytes=self.config.memory_bytes,
            tolerated_slowdown=self.config.tolerated_slowdown,
            write_bytes_per_s=self._stores.write_bytes_per_s(),
            follow=self.config.schedule == "auto",
            stall_s=self._stores.stall_s,
        )

    # ---- what users call --------------------------------------------------------------------

    def forward(self) -> ForwardPass:
        """Return the context for one micro-batch's forward; its backward runs after it.

        Raises RuntimeError on entry when closed, or inside a non-reentrant checkpoint.
        """
        self.check_open()
        return ForwardPass(self)

    def block(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`, a layer's output say, as one thing that may be computed again.

        Where `memory_bytes` is set and would not hold all that a forward saves, or where a step may
        become longer for less memory (`tolerated_slowdown`), some of its blocks save only their
        `args`, and run again in the backward with the same random numbers.
        """
        forward = self.running.current()
        if forward is None or self.running.in_block or not torch.is_grad_enabled():
            return function(*args)
        if inside_recomputing_checkpoint():  # the user's own, which runs it again as it pleases
            return function(*args)
        return forward.blocks.run(forward, function, args)

    def stats(self) -> ActivationStats:
        """Return what has happened so far; cheap enough for every step.

        Raises RuntimeError in a forked child.
        """
        if self.process != os.getpid():
            raise foreign_process(self.process)
        self.settle()
        with self.lock:
            crossings = list(self.transfers.crossings.values())
            self.counters.held_s = sum(crossing.held_s() for crossing in crossings)
        links = tuple(crossing.facts for crossing in crossings)
        native, facts = self._stores.counters(), self._stores.facts()
        planning_s = self.book.planning_s
        return snapshot(self.counters, native, facts, self.config, links, planning_s)

    def hint(self, *, next_backward: ForwardPass) -> None:
        """Say whose backward runs next, as a pipeline's scheduler knows.

        Of a forward still under way nothing leaves from now on; of one that has ended, reading
        begins. Raises ValueError for one of another instance, RuntimeError when closed.
        """
        if not isinstance(next_backward, ForwardPass):
            raise TypeError(f"next_backward={next_backward!r} is not what act.forward() returned")
        if next_backward.owner is not self:
            raise ValueError("next_backward is a forward of another ActivationOffload; hint that")
        self.check_open()
        with self.lock:
            if next_backward.ended:
                next_backward.backward.due = math.inf
                self.transfers.begin(next_backward)
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
        if kind is None and (why := self._why_nothing()):
            warnings.warn(f"nothing was offloaded: {why}", RuntimeWarning, stacklevel=2)

    def _why_nothing(self) -> str:
        if not self.book.forwards:
            return "no `with act.forward():` stood around any forward"
        passed = self.counters.passed_through
        if self.counters.any_large or passed.keys() - {"small"}:
            return ""
        if not passed:
            return "no forward saved any tensor (torch.no_grad(), or another one's hooks inside)"
        return f"every saved tensor is smaller than min_tensor_bytes={self.config.min_tensor_bytes}"

    # ---- for the passes; `lock` is held where not said otherwise -----------------------------

    def depth_of(self, forward: ForwardPass) -> int:
        """Return how many forwards wait for their backward, or are in it as `forward` is."""
        others = self.forwards - {forward}
        return 1 + sum(not other.backward.used for other in others)

    def check_open(self) -> None:
        """Raise RuntimeError in a closed instance or in a forked child. Without `lock`."""
        if self.process != os.getpid():
            raise foreign_process(self.process)
        if self.closed:
            raise RuntimeError("this ActivationOffload is closed; make a new one")

    def crossing_of(self, alias: torch.Tensor) -> Crossing | None:
        """Return the way of this tensor's bytes to the host; None where they are on it."""
        if alias.is_cpu:
            return self._emulated
        return self.transfers.crossing_to(alias.device)

    def restore(self, view: SavedView) -> torch.Tensor:
        """Return a saved tensor. Takes `lock`."""
        try:
            with self.lock:
                region: Region = view.region
                region.forward.asked_early |= not region.forward.ended
                if self.closed or region.alias._version != region.version:
                    raise not_restorable(view, self.closed)
                storage = region.original()
                if storage is not None:
                    self.transfers.forwarded(region, view.read)
                    tensor = over_storage(view, storage)
                else:
                    restored = region.restored
                    if restored is None:
                        restored = self.transfers.fetch(region, view.read)
                    elif region.crossing is not None:
                        assert isinstance(restored, torch.Tensor)
                        region.crossing.share(region, restored)
                    tensor = over_restored(view, restored)
                if not view.read:
                    view.read = True
                    region.first_read()
                elif region.forward.recording is not None:
                    region.forward.recording.asked_again.add(region.number)
                return tensor
        finally:
            if self.dropped:
                self.settle()

    def learn(self, forward: ForwardPass) -> None:
        """Remember how a whole backward went, and what the drive did meanwhile."""
        recording = forward.recording
        if any(region.crossing is not forward.crossing for region in forward.regions):
            recording = None  # nobody's clock tells the times of several devices
            self.book.several_devices = True
        depth = max(1, forward.depth)
        used = forward.backward.complete()
        try:
            waited = self.book.waited_since(forward.begun)
            small_bytes = forward.small_bytes
            self.book.learn(
                forward.signature, used, recording, depth, forward.blocks, waited, small_bytes
            )
        except _MISTAKES as error:  # training does not depend on it
            self.book.failed(error)
        if self.book.follow:
            self.book.observe(**self.transfers.totals(forward.crossing))

    # ---- the end of saved views ---------------------------------------------------------------

    @uncompiled
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
        self.transfers.forget(region)
        forward: ForwardPass = region.forward
        if forward.recording is not None and self.process == os.getpid():
            forward.recording.released[region.number] = forward.recording.mark()
        nbytes = region.nbytes
        if forward.live == 1:
            forward.all_freed()
        forward.live -= 1  # from here on nothing calls: an interruption would have it counted twice
        forward.left_bytes -= nbytes
        del self._ending[-1]
