"""Which memory a saved tensor means, said in a way that reuse of addresses cannot forge.

Everything here that torch does not document stands in this file: weak references to storages and
tensors, version counters that outlive their memory, and the number of the running operator.

Notes
-----
* A storage's or tensor's C++ address is unique only while something holds it, so a key is valid
  only together with the weak reference taken with it: that keeps the address from being reused,
  not the memory from being freed.
* A version counter belongs to a tensor and its views and `detach()`ed aliases. An alias whose data
  is replaced by an empty tensor keeps the counter alive and nothing else.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

__all__ = [
    "StorageIdentity",
    "drop_memory",
    "inside_recomputing_checkpoint",
    "operator_number",
    "physical_alias",
    "sharing_version",
    "tensor_on",
    "version_root",
]

# Untyped in torch; looked up once, since every saved tensor passes here.
_Storage: Any = torch.UntypedStorage
_WeakTensorRef: Any = torch._C._WeakTensorRef  # type: ignore[attr-defined]
# Grows when an autograd node is made, which every operator does before it saves its arguments: two
# tensors saved at the same number may be of one operator that is still running.
operator_number: Any = torch._C._autograd._get_sequence_nr
_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks


@functools.cache
def _empty(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=device)


class StorageIdentity:
    """A storage by weak reference: its key stays unique while this object lives."""

    __slots__ = ("key",)

    def __init__(self, storage: torch.UntypedStorage) -> None:
        weak: Any = storage._weak_ref()
        self.key: int = weak

    def alive(self) -> torch.UntypedStorage | None:
        """Return the storage if anybody still holds it."""
        storage: torch.UntypedStorage | None = _Storage._new_with_weak_ptr(self.key)
        return storage

    def __del__(self) -> None:
        _Storage._free_weak_ref(self.key)


def version_root(tensor: torch.Tensor) -> tuple[int, Any]:
    """Return the key of the tensor whose views share `tensor`'s version counter, and its weak ref.

    `x` and `x.data` share a storage and have equal version numbers, yet count separately; they
    differ here.
    """
    base = tensor._base
    root = tensor if base is None else base
    return root._cdata, _WeakTensorRef(root)


def physical_alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` detached, without promises to conjugate or negate: the bytes as they lie."""
    alias = tensor
    if alias.is_conj():
        alias = alias.conj()
    if alias.is_neg():
        alias = torch._neg_view(alias)
    return alias.detach()  # last: a view holds its base, whatever becomes of its data


def sharing_version(alias: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`'s memory under `alias`'s version counter.

    A change in place of either the saved tensor or the restored one is then seen by whoever else
    saved it, as without hooks.
    """
    joined = alias.detach()
    joined.data = tensor
    return joined


def drop_memory(alias: torch.Tensor) -> None:
    """Let go of the memory under `alias` (a detached tensor) and keep its version counter."""
    alias.data = _empty(alias.dtype, alias.device)


def tensor_on(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    byte_offset: int,
) -> torch.Tensor:
    """Return a new tensor over `storage`, unrelated to any autograd graph."""
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    return tensor.set_(storage, byte_offset // dtype.itemsize, size, stride)


def inside_recomputing_checkpoint() -> bool:
    """Say whether the innermost saved-tensor hooks are those of a non-reentrant checkpoint."""
    hooks = _top_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"
