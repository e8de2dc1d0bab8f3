"""One run of a storage's bytes, saved once however many tensors over it were saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from offload.activations.identity import (
    WeakTensorRef,
    drop_memory,
    storage_alive,
)
from offload.device import Moment, Restored
from offload.tiers import Staged

if TYPE_CHECKING:
    from offload.activations.crossing import Arrival, Crossing, Landed
    from offload.activations.forward import ForwardPass

__all__ = ["Region", "element_begin"]

# The largest element of any dtype: a region begins at a multiple, so that every view of it lies at
# a whole number of its own elements.
ELEMENT_BYTES = 16


def element_begin(begin: int) -> int:
    """Return where a region that holds the byte `begin` of its storage begins."""
    return begin // ELEMENT_BYTES * ELEMENT_BYTES


class Region:
    """The bytes [begin, end) of one storage at one version, and where they are now.

    Exactly one of these holds while anybody may still want the bytes: `alias` has memory (pending
    or kept), or `extent` is set. `restored` is there in addition until every view has asked.
    """

    __slots__ = (
        "ahead",
        "alias",
        "arrival",
        "begin",
        "crossing",
        "departed",
        "end",
        "extent",
        "forward",
        "handles",
        "in_memory",
        "kept",
        "landed",
        "last_save",
        "leaving",
        "made_here",
        "number",
        "older",
        "pending",
        "position",
        "queue",
        "residue",
        "restored",
        "root_key",
        "root_ref",
        "spoilt",
        "stay_bytes",
        "storage",
        "unread",
        "used",
        "version",
    )

    def __init__(
        self,
        forward: ForwardPass,
        alias: torch.Tensor,
        storage: int,
        root: torch.Tensor,
        begin: int,
        end: int,
    ) -> None:
        self.forward = forward
        self.storage = storage  # by weak reference, which its forward holds
        self.alias = alias
        # Held, so that no other tensor takes the key.
        self.root_key = root._cdata
        self.root_ref = WeakTensorRef(root)
        self.version: int = alias._version
        self.begin = element_begin(begin)
        self.end = end
        self.in_memory = True
        self.pending = True  # saved, and not staged yet
        self.kept = False  # because the SSD had no space
        self.stay_bytes = 0  # what it takes, with the rest of its storage, as its schedule says
        self.extent: Staged | None = None
        self.restored: Restored | None = None
        # Of regions on another device than the host: by which way they go; the queue they were made
        # on, as far as is known: what no operator of the graph made may be somebody else's; whether
        # they are being copied out, or were emptied meanwhile; how they lay modulo what kernels
        # look at; when their bytes had been copied out; what they come back to, and came back to.
        self.crossing: Crossing | None = forward.owner.crossing_of(alias)
        self.queue: Any = self.crossing.link.queue() if self.crossing is not None else None
        self.made_here = self.crossing is not None and root.grad_fn is not None
        self.leaving = self.spoilt = False
        self.residue = 0
        self.departed: Moment | None = None
        self.arrival: Arrival | None = None
        self.landed: Landed | None = None
        self.handles = self.unread = 0  # saved views: all, and those that nobody asked for yet
        self.older: Region | None = None  # the region of this storage saved before
        self.number = self.position = -1  # in the forward, and in the expected backward
        self.last_save = 0  # the forward's count of saves when a view of it was saved last
        self.ahead = False  # being read, or read, before anybody asked
        self.used = False  # the backward has asked

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def holds(self, root_key: int, version: int, begin: int, end: int) -> bool:
        """Say whether the bytes [begin, end) of a tensor are among these, at the same version."""
        return (
            self.begin <= begin
            and end <= self.end
            and self.handles > 0
            and self.version == version
            and self.root_key == root_key
        )

    def may_grow(self, root_key: int, version: int, begin: int, end: int) -> bool:
        """Say whether a tensor overlaps these bytes, at one version, before they are staged."""
        return (
            self.pending
            and self.begin < end
            and begin < self.end
            and self.handles > 0
            and self.version == version
            and self.root_key == root_key
        )

    def extend(self, begin: int, end: int) -> int:
        """Take in more of the storage before it is staged; return by how many bytes it grew."""
        before = self.nbytes
        self.begin = min(self.begin, element_begin(begin))
        self.end = max(self.end, end)
        return self.nbytes - before

    @property
    def device(self) -> torch.device:
        return self.alias.device

    def original(self) -> torch.UntypedStorage | None:
        """Return the storage that was saved, if it is still somewhere and as long as it was."""
        storage = self.alias.untyped_storage() if self.in_memory else storage_alive(self.storage)
        return storage if storage is not None and storage.nbytes() >= self.end else None

    def is_away(self) -> bool:
        """Say whether the bytes are nowhere but in a tier."""
        return (
            self.extent is not None
            and self.restored is None
            and storage_alive(self.storage) is None
        )

    def may_be_read(self) -> bool:
        """Say whether the bytes are in a tier only, and not on their way back."""
        return not self.ahead and self.arrival is None and self.is_away()

    def leave_memory(self) -> None:
        """Let go of the storage; the version counter stays to be checked."""
        drop_memory(self.alias)
        self.in_memory = False

    def first_read(self) -> None:
        """Note that one more of the saved views has asked, or never will."""
        self.unread -= 1
        if not self.unread:
            self.restored = None

    def free(self) -> None:
        """Give back memory and space; nobody will ask again."""
        if self.in_memory:
            self.leave_memory()
        if self.crossing is not None:
            self.crossing.forget(self)
        self.extent = self.restored = self.landed = None
