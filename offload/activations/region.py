"""One run of a storage's bytes, saved once however many tensors over it were saved."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from offload.activations.identity import StorageIdentity, drop_memory, physical_alias
from offload.device import Restored
from offload.native import Extent

if TYPE_CHECKING:
    from offload.activations.forward import ForwardPass

__all__ = ["Region"]

# The largest element of any dtype: a region begins at a multiple, so that every view of it lies at
# a whole number of its own elements.
ELEMENT_BYTES = 16


class Region:
    """The bytes [begin, end) of one storage at one version, and where they are now.

    Exactly one of these holds while anybody may still want the bytes: `alias` has memory (pending
    or kept), or `extent` is set. `buffer` is there in addition while restored bytes are shared.
    """

    __slots__ = (
        "__weakref__",
        "ahead",
        "alias",
        "begin",
        "buffer",
        "end",
        "extent",
        "forward",
        "handles",
        "in_memory",
        "kept",
        "number",
        "position",
        "residue",
        "restored",
        "root",
        "storage",
        "unread",
        "used",
        "version",
    )

    def __init__(
        self,
        forward: ForwardPass,
        tensor: torch.Tensor,
        storage: torch.UntypedStorage,
        root: tuple[int, Any],
        span: tuple[int, int],
        number: int,
    ) -> None:
        self.forward = forward
        self.alias = physical_alias(tensor)
        self.in_memory = True
        self.kept = False  # because the SSD had no space
        self.storage = StorageIdentity(storage)
        self.root = root
        self.version: int = tensor._version
        self.begin = span[0] // ELEMENT_BYTES * ELEMENT_BYTES
        self.end = span[1]
        self.number = number
        self.extent: Extent | None = None
        self.buffer: Restored | None = None
        self.restored: weakref.ref[Restored] | None = None
        self.residue = 0  # of its address, modulo what kernels look at
        self.handles = 0
        self.unread = 0
        self.position = -1
        self.ahead = False  # being read, or read, before anybody asked
        self.used = False  # the backward has asked

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def covers(self, root_key: int, version: int, begin: int, end: int) -> bool:
        """Say whether the bytes [begin, end) of a tensor are among these, at the same version."""
        return (
            self.begin <= begin
            and end <= self.end
            and self.version == version
            and self.root[0] == root_key
        )

    def extend(self, begin: int, end: int) -> int:
        """Take in more of the storage before it is staged; return by how many bytes it grew."""
        before = self.nbytes
        self.begin = min(self.begin, begin // ELEMENT_BYTES * ELEMENT_BYTES)
        self.end = max(self.end, end)
        return self.nbytes - before

    def changed(self) -> bool:
        """Say whether the tensor was changed in place since it was saved."""
        return self.alias._version != self.version

    def has_memory(self) -> bool:
        """Say whether the storage is as long as when the tensor was saved; while `in_memory`."""
        return self.alias.untyped_storage().nbytes() >= self.end

    @property
    def device(self) -> torch.device:
        return self.alias.device

    def address(self) -> int:
        """Return where the region begins on its device; only while `in_memory`."""
        return self.alias.untyped_storage().data_ptr() + self.begin

    def leave_memory(self) -> None:
        """Let go of the storage; the version counter stays to be checked."""
        drop_memory(self.alias)
        self.in_memory = False

    def share(self, buffer: Restored) -> None:
        """Remember restored bytes: strongly until every saved view has asked once, then weakly.

        The weak half keeps a second backward over a retained graph from holding everything.
        """
        self.restored = weakref.ref(buffer)
        self.buffer = buffer if self.unread else None

    def shared(self) -> Restored | None:
        """Return the restored bytes if they are still somewhere."""
        if self.buffer is not None:
            return self.buffer
        return self.restored() if self.restored is not None else None

    def first_read(self) -> None:
        """Note that one more of the saved views has asked, or never will."""
        self.unread -= 1
        if not self.unread:
            self.buffer = None

    def free(self) -> None:
        """Give back memory and space; nobody will ask again."""
        if self.in_memory:
            self.leave_memory()
        self.extent = None
        self.buffer = None
        self.restored = None
