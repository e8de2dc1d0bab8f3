"""What the pack hook hands to autograd in a tensor's place; each kind knows its way back."""

from __future__ import annotations

import torch

from offload.activations.identity import drop_memory, root_of, sharing_version, tensor_on
from offload.device import Restored, view_over
from offload.native import SavedView, crc32c

__all__ = ["Kept", "RecastParameter", "Saved", "not_restorable", "over_restored", "over_storage"]


def changed_in_place(what: str, found: int, expected: int) -> RuntimeError:
    """Return the error that autograd itself raises where no hooks are set."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: {what} is at version {found}; expected version {expected} instead. Clone the "
        "tensor before changing it, or change it after the backward."
    )


def not_restorable(view: SavedView, closed: bool) -> RuntimeError:
    """Return why `view` cannot come back: its instance is closed, or it was changed in place."""
    if closed:
        return RuntimeError(
            "a saved activation is asked for after its ActivationOffload was closed; "
            "close it after the last backward"
        )
    region = view.region
    what = f"[{view.dtype} {list(view.size)}]"
    return changed_in_place(what, region.alias._version, region.version)


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


Saved = Kept | RecastParameter | SavedView
"""What the pack hook returns."""


def over_storage(view: SavedView, storage: torch.UntypedStorage) -> torch.Tensor:
    """Return `view` of the storage it was saved from."""
    bare = tensor_on(storage, view.dtype, view.size, view.stride, view.offset)
    return _joined(view, bare)


def over_restored(view: SavedView, restored: Restored) -> torch.Tensor:
    """Return `view` of its region's restored bytes, which it keeps alive.

    Its storage offset counts from the region's first byte, which is the storage's own unless only a
    later part was saved; size, strides, dtype and address modulo 64 are as they were.
    """
    first_byte = view.offset - view.region.begin
    return _joined(view, view_over(restored, view.dtype, view.size, view.stride, first_byte))


def _joined(view: SavedView, bare: torch.Tensor) -> torch.Tensor:
    tensor = sharing_version(view.region.alias, bare)
    if view.conj:
        tensor = tensor.conj()
    if view.neg:
        tensor = torch._neg_view(tensor)
    return tensor
