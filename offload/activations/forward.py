"""One forward and the backward that belongs to it: what it saved, in which order it is wanted."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from offload.activations.classify import parameter_of_cast, reason_to_pass, span_of
from offload.activations.identity import (
    inside_recomputing_checkpoint,
    operator_number,
    version_root,
)
from offload.activations.region import Region
from offload.activations.saved import Kept, RecastParameter, Saved, SavedView, checksum_of

if TYPE_CHECKING:
    from offload.activations.offloader import ActivationOffload

__all__ = ["ForwardPass"]


def _unpack(saved: Saved) -> torch.Tensor:
    return saved.unpack()


class ForwardPass:
    """The context of one micro-batch's forward. Enter it once, in the thread that runs it."""

    def __init__(self, owner: ActivationOffload) -> None:
        self.owner = owner
        self.regions: list[Region] = []
        self.live = 0
        self.order: list[int] = []  # of region numbers, as the backward is expected to want them
        self.used: list[int] = []  # the same, as it really did
        self.cursor = 0
        self._pending: list[Region] = []
        self._pending_operator = -1
        self._buffers: set[int] = set()
        self._noted_modules: set[int] = set()
        self._noted: dict[int, tuple[torch.Tensor, int, int]] = {}
        self._sums: dict[int, int] = {}  # checksums of recast parameters, by id
        self._min_bytes = owner.config.min_tensor_bytes
        self._recast = owner.config.recast_parameters
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    # ---- the forward ------------------------------------------------------------------------

    def __enter__(self) -> ForwardPass:
        if self._hooks is not None:
            raise RuntimeError("act.forward() is entered a second time; call act.forward() again")
        self.owner.check_open()
        if inside_recomputing_checkpoint():
            raise RuntimeError(
                "act.forward() is inside torch.utils.checkpoint, which would save everything it "
                "is meant to recompute; open act.forward() around the checkpointed call instead"
            )
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        hooks.__enter__()
        self._hooks = hooks
        self._module_hook = register_module_forward_pre_hook(self._note_module)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._hooks is not None
        self._module_hook.remove()
        self._hooks.__exit__(kind, error, trace)
        with self.owner.lock:
            if kind is None:
                self._stage_pending()
                self._expect_backward()
            # After an exception the graph is about to be dropped; what was not staged stays put.
            self._pending.clear()
            self.owner.flush()
        self._noted.clear()
        self._sums.clear()
        self.owner.settle()

    def _note_module(self, module: torch.nn.Module, _args: object) -> None:
        for buffer in module._buffers.values():
            if buffer is not None and buffer.layout is torch.strided:
                # Valid while the module holds the buffer, which it does during its forward.
                self._buffers.add(buffer.untyped_storage()._cdata)
        if not self._recast or id(module) in self._noted_modules:
            return
        # With the whole tree, since a module may use its children's parameters without calling
        # them. Held, so that no other tensor can take a noted one's id.
        number = operator_number()
        self._noted_modules.update(id(part) for part in module.modules())
        for parameter in module.parameters():
            self._noted.setdefault(id(parameter), (parameter, parameter._version, number))

    def _parameter_to_recast(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the parameter that `tensor` was cast from, if it has not changed since the cast.

        That is certain only of a cast made after the parameter's version was noted, while that
        version stands: autocast hands out stale casts after an optimizer step inside its region.
        """
        parameter = parameter_of_cast(tensor)
        noted = self._noted.get(id(parameter)) if parameter is not None else None
        if parameter is None or noted is None or parameter._version != noted[1]:
            return None
        cast = tensor if tensor._base is None else tensor._base
        assert cast.grad_fn is not None
        return parameter if cast.grad_fn._sequence_nr() >= noted[2] else None

    def _pack(self, tensor: torch.Tensor) -> Saved:
        # An operator may still write to what it has saved (its own output, a mask, noise), so
        # copying waits until the next operator has made its node.
        if self._pending and self._pending_operator != operator_number():
            with self.owner.lock:
                self._stage_pending()
            self.owner.settle()
        reason = reason_to_pass(tensor, self._min_bytes)
        if reason is None:
            return self._pack_large(tensor)
        return self._pass(tensor, reason)

    def _pass(self, tensor: torch.Tensor, reason: str) -> Kept:
        nbytes = 0 if reason == "sparse" else tensor.numel() * tensor.dtype.itemsize
        passed = self.owner.counters.passed_through
        passed[reason] = passed.get(reason, 0) + nbytes
        return Kept(tensor, tensor._version)

    def _pack_large(self, tensor: torch.Tensor) -> Saved:
        owner = self.owner
        parameter = self._parameter_to_recast(tensor) if self._recast else None
        if parameter is not None:
            owner.counters.recast += tensor.nbytes
            checksum = self._sums.get(id(parameter))
            if checksum is None:
                checksum = self._sums[id(parameter)] = checksum_of(parameter)
            return RecastParameter(tensor, parameter, checksum)
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._buffers:
            return self._pass(tensor, "buffer")
        begin, end = span_of(tensor)
        if storage.nbytes() < end:
            return self._pass(tensor, "emptied")
        version = tensor._version
        root = version_root(tensor)
        with owner.lock:
            for region in owner.regions.get(key, ()):
                # Only within one forward: a buffer refilled behind the version counter (through
                # numpy, say) is other data in the next one.
                if region.forward is self and region.covers(root[0], version, begin, end):
                    owner.counters.deduplicated += end - begin
                    return SavedView(region, tensor)
            for region in self._pending:
                overlaps = region.begin < end and begin < region.end
                if (
                    region.handles
                    and overlaps
                    and region.storage.key == key
                    and region.root[0] == root[0]
                    and region.version == version
                ):
                    owner.counters.deduplicated += end - begin - region.extend(begin, end)
                    return SavedView(region, tensor)
            region = Region(self, tensor, storage, root, (begin, end), len(self.regions))
            self.regions.append(region)
            self.live += 1
            owner.regions.setdefault(key, []).append(region)
            self._pending.append(region)
            self._pending_operator = operator_number()
            return SavedView(region, tensor)

    def _stage_pending(self) -> None:
        try:
            for region in self._pending:
                if region.handles:
                    self.owner.stage(region)
        finally:
            self._pending.clear()  # what could not be staged stays in memory

    # ---- the backward -----------------------------------------------------------------------

    def _expect_backward(self) -> None:
        """Predict the order of the backward: as last time for the same sizes, else reversed."""
        signature = self.signature()
        learned = self.owner.learned_order(signature)
        count = len(self.regions)
        self.order = learned if learned is not None else list(range(count - 1, -1, -1))
        for position, number in enumerate(self.order):
            self.regions[number].position = position
        held = 0
        for region in self.regions:
            if not region.in_memory and region.handles and region.storage.alive() is not None:
                held += region.nbytes
        self.owner.counters.still_held += held

    def signature(self) -> tuple[int, ...]:
        """Return what two forwards must share to be expected to run backward alike."""
        return tuple(region.nbytes for region in self.regions)

    def read_ahead(self, region: Region) -> None:
        """Note that the backward wants `region`; start reading what should come next, in bounds."""
        if region.position < 0:
            return
        if not region.used:
            region.used = True
            self.used.append(region.number)
            self.cursor = max(self.cursor, region.position + 1)
        else:
            self.cursor = region.position + 1  # another backward over a retained graph
        owner = self.owner
        if not owner.wants_read_ahead():
            return
        while self.cursor < len(self.order) and owner.may_read_ahead():
            ahead = self.regions[self.order[self.cursor]]
            if self._wants_reading(ahead) and not owner.start_reading(ahead):
                return
            self.cursor += 1

    @staticmethod
    def _wants_reading(region: Region) -> bool:
        return (
            region.extent is not None
            and not region.ahead
            and region.shared() is None
            and region.storage.alive() is None
        )

    def region_freed(self) -> None:
        """Take leave of one region; with the last one, teach the owner the order that was used."""
        self.live -= 1
        if self.live == 0 and self._hooks is not None and self.order:
            if len(self.used) == len(self.regions):
                self.owner.learn_order(self.signature(), self.used)
            self.regions = []
            self.order = []
