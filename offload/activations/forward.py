"""One forward and the backward that belongs to it: what it saved, in which order it is wanted."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from os import getpid
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from offload.activations.backward import BackwardOrder
from offload.activations.blocks import BlockRuns
from offload.activations.classify import parameter_of_cast, reason_to_pass, span_of, taken_span
from offload.activations.identity import (
    inside_recomputing_checkpoint,
    operator_number,
    physical_alias,
    release_weak_storage,
    root_of,
    storage_alive,
    weak_storage,
)
from offload.activations.owned import Owned
from offload.activations.plan import Plan
from offload.activations.recording import HostClock, Recording
from offload.activations.region import Region, element_begin
from offload.activations.saved import Kept, RecastParameter, Saved
from offload.activations.uncompiled import uncompiled
from offload.device import refuse_capture
from offload.native import HeldKeys, HookScope, SavedView

if TYPE_CHECKING:
    from offload.activations.crossing import Crossing
    from offload.activations.offloader import ActivationOffload

__all__ = ["ForwardPass"]

# How many of a storage's latest regions are looked at for an overlap.
_LATEST_REGIONS = 16
_push_hooks: Any = torch._C._autograd._push_saved_tensors_default_hooks


@uncompiled
def _unpack(saved: Saved) -> torch.Tensor:
    if isinstance(saved, SavedView):
        forward: ForwardPass = saved.region.forward
        return forward.owner.restore(saved)
    return saved.unpack()


class ForwardPass(HookScope):
    """The context of one micro-batch's forward. Enter it once, in the thread that runs it."""

    active = False
    _pop: Any = torch._C._autograd._pop_saved_tensors_default_hooks

    def __init__(self, owner: ActivationOffload) -> None:
        self.owner = owner
        self.regions: list[Region] = []
        self.live = self._saves = 0
        self.left_bytes = 0  # of regions that somebody may still want
        self.small_bytes = 0  # saved in tensors that are too small to leave
        self.staying: set[int] = set()  # storages that the schedule keeps
        self.backward = BackwardOrder(self.regions)
        self.signature: tuple[int, ...] = ()
        self.plan: Plan | None = None
        self._unlike_all = False  # that are known
        # On the host's clock, unless the first tensor lies on a device.
        self.recording = Recording(HostClock(owner.book.idle_s)) if owner.book.follow else None
        self.crossing: Crossing | None = None
        self._met_any = False
        self.blocks = BlockRuns()
        self.depth = 0  # of forwards under way at once, itself included
        self.stays = False  # nothing leaves from now on
        # Weak references to storages: keys, unique while they are held, which is until nobody can
        # ask for any region.
        self._weak = HeldKeys(release_weak_storage)
        self._newest: dict[int, Region] = {}  # of a storage
        self._pieces: dict[tuple[int, int, int], Region] = {}  # of storages with several
        self._pending: list[Region] = []
        self._pending_operator = -1
        self._small: set[int] | None = set() if owner.book.blocks.wanted else None
        self._min_bytes = max(1, owner.config.min_tensor_bytes)
        self._recast = owner.config.recast_parameters
        self._owned = Owned(self._weak, recast=self._recast)
        self._stays_on_host = owner.stays_on_host
        self._dropped = owner.dropped
        self._entered = self.ended = self.asked_early = False

    # ---- the forward ------------------------------------------------------------------------

    @uncompiled
    def _begin(self) -> Any:
        if self._entered:
            raise RuntimeError("act.forward() is entered a second time; call act.forward() again")
        self.owner.check_open()
        refuse_capture()
        self.begun = self.owner.book.begin(perf_counter())
        if inside_recomputing_checkpoint():
            raise RuntimeError(
                "act.forward() is inside torch.utils.checkpoint, which would save everything it "
                "is meant to recompute; open act.forward() around the checkpointed call instead"
            )
        self._entered = True
        running = self.owner.running
        self.outer, running.forward = running.current(), self
        self._outer_in_block, running.in_block = running.in_block, False
        return functools.partial(_push_hooks, self._pack, _unpack)

    @uncompiled
    def _end(self, kind: type[BaseException] | None, *_exception: object) -> None:
        running = self.owner.running
        running.forward, running.in_block = self.outer, self._outer_in_block
        self._owned.clear()
        owner = self.owner
        try:
            with owner.lock:
                self.ended = True
                if kind is None:
                    self._stage_pending()
                    self._expect_backward()
                # After an exception the graph is about to be dropped; what was not staged stays.
                self._pending.clear()
                if not self.live:
                    self.all_freed()
                owner.transfers.flush()
        finally:
            owner.settle()
        owner.transfers.say_if_full()
        owner.book.say_what_is_wrong()

    def note_module(self, module: torch.nn.Module) -> None:
        """Take in that `module` is about to run."""
        if self.blocks.used is not None:
            self.blocks.used.note_module(module)
        self._owned.note_module(module)

    @uncompiled
    def _pack(self, tensor: torch.Tensor) -> Saved:
        reason = reason_to_pass(tensor, self._min_bytes)
        if reason is None and self._recast and tensor.is_cpu:
            parameter = parameter_of_cast(tensor)
            if parameter is not None and self._owned.unchanged_since_cast(parameter, tensor):
                reason = "recast"
        if reason is None:
            return self._pack_large(tensor)
        if self._pending and self._pending_operator != operator_number():
            self._stage_earlier()
        if reason == "recast":
            assert parameter is not None
            self.owner.counters.recast += tensor.nbytes
            return RecastParameter(tensor, parameter)
        return self._pass(tensor, reason)

    def _stage_earlier(self) -> None:
        owner = self.owner
        try:
            with owner.lock:
                self._stage_pending()
        finally:
            owner.settle()

    def _pass(self, tensor: torch.Tensor, reason: str) -> Kept:
        nbytes = 0 if reason == "sparse" else tensor.nbytes
        passed = self.owner.counters.passed_through
        passed[reason] = passed.get(reason, 0) + nbytes
        if self._small is not None and reason == "small":
            key = tensor.untyped_storage()._cdata
            if key not in self._small:  # it lives until the backward, so that no other has its key
                self._small.add(key)
                self.small_bytes += nbytes
        return Kept(tensor, tensor._version)

    def _pack_large(self, tensor: torch.Tensor) -> Saved:
        owner = self.owner
        storage = tensor.untyped_storage()
        key = storage._cdata
        begin, end = span_of(tensor)
        if key in self._owned.kinds:
            return self._pass(tensor, self._owned.kinds[key])
        if storage.nbytes() < end:
            return self._pass(tensor, "emptied")
        if self._stays_on_host and tensor.is_cpu:
            return self._pass(tensor, "on_host")
        conj = tensor.is_conj()
        neg = tensor.is_neg()
        try:
            with owner.lock:
                # An operator may still write to what it has saved (its own output, a mask, noise),
                # so copying waits until the next operator has made its node.
                if self._pending and self._pending_operator != operator_number():
                    self._stage_pending()
                region = (
                    self._saved_before(tensor, key, begin, end) if key in self._newest else None
                )
                if region is None:
                    alias = physical_alias(tensor) if conj or neg else tensor.detach()
                    self._weak.append(weak_storage(storage))
                    span = taken_span(tensor, begin, end)
                    region = Region(self, alias, key, root_of(tensor), *span)
                    self._register(region)
                region.last_save = self._saves = self._saves + 1
                dtype, size, stride = tensor.dtype, tensor.shape, tensor.stride()
                nbytes = region.nbytes
                # A signal's handler may raise in any call: these counts and the view that gives
                # them back belong together.
                if not region.handles:
                    self.live += 1
                    self.left_bytes += nbytes
                region.handles += 1
                region.unread += 1
                return SavedView(self._dropped, region, dtype, size, stride, begin, conj, neg)
        finally:
            if owner.dropped:
                owner.settle()

    def _saved_before(self, tensor: torch.Tensor, key: int, begin: int, end: int) -> Region | None:
        """Return a region with these bytes of the storage, grown to hold them if need be.

        Only of this forward: a buffer refilled behind the version counter (through numpy, say) is
        other data in the next one. A piece saved before is always found; an overlap only with the
        latest ones, since looking at all of very many pieces would be quadratic.
        """
        root_key = root_of(tensor)._cdata
        version = tensor._version
        region: Region | None = self._newest[key]
        for _ in range(_LATEST_REGIONS):
            if region is None:
                return None
            if region.holds(root_key, version, begin, end):
                self.owner.counters.deduplicated += end - begin
                return region
            if region.may_grow(root_key, version, begin, end):
                grown = region.extend(begin, end)
                self.left_bytes += grown
                self.owner.counters.deduplicated += end - begin - grown
                return region
            region = region.older
        region = self._pieces.get((key, element_begin(begin), end))
        if region is not None and region.holds(root_key, version, begin, end):
            self.owner.counters.deduplicated += end - begin
            return region
        return None

    def _register(self, region: Region) -> None:
        if not self.live:
            self.owner.counters.any_large = True
            self.owner.forwards.add(self)
            self.owner.transfers.bound_memory()
        if not self._met_any:
            self.meet(region.alias)
        region.number = len(self.regions)
        self.regions.append(region)
        if self.recording is not None:
            self.recording.save(region.storage, region.alias.untyped_storage().nbytes())
        key = region.storage
        region.older = older = self._newest.get(key)
        if older is not None:
            self._pieces[key, older.begin, older.end] = older
        self._newest[key] = region
        self._pending.append(region)
        self._pending_operator = operator_number()

    def meet(self, tensor: torch.Tensor) -> None:
        """Have the first tensor say where this forward computes. The owner's lock is held."""
        if not self._met_any:
            self._met_any = True
            self.crossing = self.owner.crossing_of(tensor)
            if self.crossing is not None and self.recording is not None:
                self.recording = Recording(self.crossing.clock())

    def regions_of(self, values: Iterable[object]) -> tuple[int, ...]:
        """Return the numbers of the latest regions that hold bytes of these tensors."""
        found = []
        for value in values:
            if value.__class__ is torch.Tensor and value.layout is torch.strided:
                region = self._newest.get(value.untyped_storage()._cdata)
                if region is not None:
                    found.append(region.number)
        return tuple(found)

    def _stage_pending(self) -> None:
        """Send out what is due; the owner's lock is held."""
        owner = self.owner
        if owner.closed:
            owner.check_open()
        pending = self._pending
        follow = owner.book.follow
        try:
            for region in pending:
                region.pending = False
                if not region.handles:
                    continue
                tier = "" if self.stays or not follow else self._planned_tier(region)
                if self.stays:
                    owner.transfers.stay(region)
                elif tier != "device":
                    owner.transfers.stage(region, tier)
        finally:
            pending.clear()  # what could not be staged stays in memory

    def _planned_tier(self, region: Region) -> str:
        """Say where the plan has `region` be, or "" without one; look for another plan where its
        size is wrong.
        """
        plan, number, book = self.plan, region.number, self.owner.book
        if plan is None and self._unlike_all:
            return ""
        if plan is None or number >= len(plan.sizes) or plan.sizes[number] != region.nbytes:
            sizes = [earlier.nbytes for earlier in self.regions[: number + 1]]
            begin = self.recording.mark() if self.recording is not None else None
            plan = self.plan = book.plan_like(sizes)
            if self.recording is not None:
                self.recording.clock.waited(begin)
            if plan is None:
                self._unlike_all = True
                book.record_next = self.recording is None
                return ""
            if self.crossing is not None:
                plans = [forward.plan for forward in self.owner.forwards]
                windows = [other.schedule.window_bytes for other in plans if other is not None]
                self.crossing.allow(max(windows, default=0))
            if plan.confirmed and not book.record_next and not self.blocks.to_learn:
                self.recording = None
        tier = plan.tiers[number]
        if tier == "device":
            if book.probe_bytes > 0:
                book.probe_bytes -= region.nbytes
                return ""
            if self.recording is not None and number in plan.held:
                return ""  # to see whether somebody still holds it
            self.owner.transfers.stay(region)
        return tier

    # ---- the backward -----------------------------------------------------------------------

    def _expect_backward(self) -> None:
        """Predict the order of the backward: as last time for the same sizes, else reversed."""
        # What two forwards must share to be expected to run backward alike.
        self.signature = tuple([region.end - region.begin for region in self.regions])
        self.depth = self.owner.depth_of(self)
        if self.plan is not None and self.plan.sizes == self.signature:
            if self.backward.expect(self.plan, None, alone=self.depth == self.plan.depth == 1):
                self.owner.transfers.begin(self)
            counters, plan = self.owner.counters, self.plan
            counters.predicted_peak = plan.schedule.peak_bytes + plan.small_bytes
            counters.predicted_slowdown = plan.slowdown
        else:
            if self.plan is not None:  # it saves more than this forward did
                self.plan, self.owner.book.record_next = None, self.recording is None
            self.backward.expect(None, self.owner.book.order_of(self.signature), alone=True)
        held = 0
        for region in self.regions:
            gone = region.in_memory or region.leaving or not region.handles
            if not gone and storage_alive(region.storage) is not None:
                held += region.nbytes
                if self.recording is not None:
                    self.recording.held.add(region.number)
        self.owner.counters.still_held += held

    def all_freed(self) -> None:
        """Take leave of the last region; teach the owner the order that was used."""
        self.depth = max(self.depth, self.owner.depth_of(self))
        self.owner.forwards.discard(self)
        self.owner.transfers.bound_memory()
        if not self.ended:
            return  # more may come
        if self.backward.used and self.owner.process == getpid():
            self.owner.learn(self)
        elif self.asked_early:
            self.owner.book.backward_inside = True
        if not self.owner.forwards:
            self.owner.transfers.finish()
        self.regions = []
        self.backward = BackwardOrder(self.regions)
        self._newest = {}
        self._pieces = {}
        self._weak.free()
