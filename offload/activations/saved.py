"""What the pack hook hands to autograd in a tensor's place; each kind knows its way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from offload.activations.identity import drop_memory, sharing_version, tensor_on
from offload.device import Restored, view_over
from offload.native import crc32c

if TYPE_CHECKING:
    from offload.activations.region import Region

__all__ = ["Kept", "RecastParameter", "Saved", "SavedView", "changed_in_place", "checksum_of"]


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


def checksum_of(parameter: torch.Tensor) -> int:
    """Return the CRC32C of a dense host tensor's bytes."""
    return crc32c(parameter.data_ptr(), parameter.nbytes)


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
    """A low-precision copy of a parameter, to be made again from the parameter."""

    __slots__ = (
        "alias",
        "checksum",
        "dtype",
        "geometry",
        "parameter",
        "parameter_version",
        "version",
    )

    def __init__(self, tensor: torch.Tensor, parameter: torch.Tensor, checksum: int) -> None:
        self.parameter = parameter
        self.checksum = checksum
        self.parameter_version = parameter._version
        self.dtype = tensor.dtype
        self.geometry = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        self.version = tensor._version
        self.alias = tensor.detach()
        drop_memory(self.alias)

    def unpack(self) -> torch.Tensor:
        """Cast the parameter again: the same bits, as long as neither has changed."""
        if self.alias._version != self.version:
            what = f"[a {self.dtype} copy of a parameter, {list(self.geometry[0])}]"
            raise changed_in_place(what, self.alias._version, self.version)
        # The version does not see `parameter.data` change, for which a stored copy would not care.
        found = self.parameter._version
        if found != self.parameter_version or checksum_of(self.parameter) != self.checksum:
            raise RuntimeError(
                f"a parameter {list(self.parameter.shape)} was modified by an inplace operation "
                "between a forward that cast it and the backward, which would cast it again; "
                "change it after the backward, or set recast_parameters=False to store its copy"
            )
        with torch.no_grad():
            return self.parameter.detach().to(self.dtype).as_strided(*self.geometry)


class SavedView:
    """One saved tensor over a region. Its death is the region's loss of a reader."""

    __slots__ = ("conj", "dtype", "neg", "offset", "read", "region", "size", "stride")

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
        self.read = False
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

    def __del__(self) -> None:
        region = self.region
        region.forward.owner.dropped(region, self.read)
