"""What the pack hook hands to autograd in a tensor's place; each kind knows its way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from offload.activations.identity import drop_memory, root_of, sharing_version, tensor_on
from offload.device import Restored, view_over
from offload.native import DropNotice, crc32c

if TYPE_CHECKING:
    from offload.activations.region import Region

__all__ = ["Kept", "RecastParameter", "Saved", "SavedView", "changed_in_place"]


class Saved(Protocol):
    """Anything the pack hook returned."""

    def unpack(self) -> torch.Tensor:
        """Return the tensor as it was saved; raises RuntimeError if it was changed in place."""


def changed_in_place(what: str, found: int, expected: int) -> RuntimeError:
    """Return the error that autograd itself raises where no hooks are set."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: {what} is at version {found}; expected version {expected} instead. Clone the "
        "tensor before changing it, or change it after the backward."
    )


def checksum_of(tensor: torch.Tensor) -> int:
    """Return the CRC32C of a dense host tensor's bytes."""
    return crc32c(tensor.data_ptr(), tensor.nbytes)


class Kept:
    """A tensor that stays where it is. Held detached: holding it whole would keep its graph.

    A leaf has no graph and is held itself: its owner may replace its `data` before the backward.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor, version: int) -> None:
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = version

    def unpack(self) -> torch.Tensor:
        """Return the detached tensor; autograd joins it to the graph again."""
        tensor = self.tensor
        if tensor._version != self.version:
            what = f"[{tensor.type()} {list(tensor.shape)}]"
            raise changed_in_place(what, tensor._version, self.version)
        return tensor


class RecastParameter:
    """A low-precision copy of a parameter, to be made again from the parameter.

    The copy's bytes have a checksum, since its memory is gone and neither it nor the parameter need
    have moved its version when it was changed through `.data`.
    """

    __slots__ = ("alias", "checksum", "dtype", "geometry", "parameter", "version")

    def __init__(self, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
        self.parameter = parameter
        self.checksum = checksum_of(root_of(tensor))
        self.dtype = tensor.dtype
        self.geometry = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        self.version = tensor._version
        self.alias = tensor.detach()
        drop_memory(self.alias)

    def unpack(self) -> torch.Tensor:
        """Cast the parameter again: the same bits, or RuntimeError."""
        if self.alias._version != self.version:
            what = f"[a {self.dtype} copy of a parameter, {list(self.geometry[0])}]"
            raise changed_in_place(what, self.alias._version, self.version)
        with torch.no_grad():
            copy = self.parameter.detach().to(self.dtype)
        if checksum_of(copy) != self.checksum:
            raise RuntimeError(
                f"a parameter {list(self.parameter.shape)} or its {self.dtype} copy was modified "
                "by an inplace operation (through .data, maybe) between the cast and the backward, "
                "which would cast it again; change it after the backward, or set "
                "recast_parameters=False to store the copy"
            )
        return copy.as_strided(*self.geometry)


class SavedView:
    """One saved tensor over a region. Its end is the region's loss of a reader, told by `notice`.

    It returns with its size, strides, dtype and address modulo 64. Its storage offset counts from
    the region's first byte, which is the storage's own unless only a later part was saved.
    """

    __slots__ = ("conj", "dtype", "neg", "notice", "offset", "region", "size", "stride")

    def __init__(
        self, region: Region, tensor: torch.Tensor, offset: int, conj: bool, neg: bool
    ) -> None:
        self.region = region
        self.size = tensor.shape
        self.stride = tensor.stride()
        self.dtype = tensor.dtype
        self.offset = offset  # of the first element in its storage, in bytes
        # Both are promises about the bytes, not in them.
        self.conj = conj
        self.neg = neg
        owner = region.forward.owner
        self.notice = DropNotice(owner.dropped, region, owner.settle)
        region.handles += 1
        region.unread += 1

    def unpack(self) -> torch.Tensor:
        """Return the tensor, reading it back if need be."""
        return self.region.forward.owner.restore(self)

    def over_storage(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """Return this view of the storage it was saved from."""
        return self._joined(tensor_on(storage, self.dtype, self.size, self.stride, self.offset))

    def over_restored(self, restored: Restored) -> torch.Tensor:
        """Return this view of the region's restored bytes, which it keeps alive."""
        first_byte = self.offset - self.region.begin
        return self._joined(view_over(restored, self.dtype, self.size, self.stride, first_byte))

    def _joined(self, bare: torch.Tensor) -> torch.Tensor:
        tensor = sharing_version(self.region.alias, bare)
        if self.conj:
            tensor = tensor.conj()
        if self.neg:
            tensor = torch._neg_view(tensor)
        return tensor
