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
    "WeakTensorRef",
    "drop_memory",
    "inside_recomputing_checkpoint",
    "operator_number",
    "physical_alias",
    "release_weak_storage",
    "root_of",
    "sharing_version",
    "storage_alive",
    "tensor_on",
    "weak_storage",
]

# Untyped in torch; looked up once, since every saved tensor passes here.
_new_with_weak_ptr: Any = torch.UntypedStorage._new_with_weak_ptr
# Returns a weak reference (an int) to a storage, which is also its key: nothing else has it
# meanwhile. Whoever takes one gives it back with `release_weak_storage`.
weak_storage: Any = torch.UntypedStorage._weak_ref
release_weak_storage: Any = torch.UntypedStorage._free_weak_ref
WeakTensorRef: Any = torch._C._WeakTensorRef  # type: ignore[attr-defined]
# Grows when an autograd node is made, which every operator does before it saves its arguments: two
# tensors saved at the same number may be of one operator that is still running.
operator_number: Any = torch._C._autograd._get_sequence_nr
_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks


# What stands in for memory that was let go of. Its dtype does not matter.
_NOTHING = torch.empty(0)


@functools.cache
def _nothing_on(device: torch.device) -> torch.Tensor:
    return torch.empty(0, device=device)


def storage_alive(weak: int) -> torch.UntypedStorage | None:
    """Return the storage if anybody still holds it."""
    storage: torch.UntypedStorage | None = _new_with_weak_ptr(weak)
    return storage


def root_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor whose views share `tensor`'s version counter.

    `x` and `x.data` share a storage and have equal version numbers, yet count separately; their
    roots differ, and so do the `_cdata` of these while weak references to both are held.
    """
    base = tensor._base
    return tensor if base is None else base


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
    alias.data = _NOTHING if alias.is_cpu else _nothing_on(alias.device)


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
