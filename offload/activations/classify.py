"""What can be offloaded and restored exactly, and why the rest is passed through."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from offload.device import can_offload

__all__ = ["parameter_of_cast", "reason_to_pass", "span_of", "taken_span"]

# Looked up once, since every saved tensor passes here.
_Tensor = torch.Tensor
_STRIDED = torch.strided
_LOW_PRECISION = (torch.bfloat16, torch.float16)
# The part of a storage from which on a view with gaps spans nearly all of it.
_NEARLY = 0.875


def reason_to_pass(tensor: torch.Tensor, min_bytes: int) -> str | None:
    """Return why `tensor` stays where it is, or None if it can go and come back exactly.

    `min_bytes` is at least 1: there is nothing to move of an empty tensor.
    """
    if tensor.__class__ is not _Tensor:
        return "parameter" if isinstance(tensor, Parameter) else "subclass"
    if tensor.layout is not _STRIDED:
        return "sparse"
    if tensor.nbytes < min_bytes:
        return "small"
    base = tensor._base
    if base is not None and isinstance(base, Parameter):
        return "parameter"
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantized"
    if not tensor.is_cpu and not can_offload(tensor):
        return "device"
    if tensor.requires_grad and tensor.is_leaf:
        return "parameter"
    return None


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the bytes [begin, end) of its storage that a non-empty strided tensor touches."""
    itemsize = tensor.dtype.itemsize
    first = int(tensor.storage_offset())
    if tensor.is_contiguous():
        return first * itemsize, first * itemsize + tensor.nbytes
    last = first + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return first * itemsize, (last + 1) * itemsize


def taken_span(tensor: torch.Tensor, begin: int, end: int) -> tuple[int, int]:
    """Return which bytes of its storage leave with a tensor that spans [begin, end).

    All of them where it has gaps and spans nearly all: what fills the gaps (the other halves of a
    product that is cut by columns, say) is probably saved as well, and is there already then.
    """
    nbytes = tensor.untyped_storage().nbytes()
    if end - begin > tensor.nbytes and _NEARLY * nbytes <= end - begin:
        return 0, nbytes
    return begin, end


def parameter_of_cast(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the parameter that `tensor` is a low-precision copy (or a view of one) of.

    Autocast makes such a copy of every weight, and operators save it or its transpose. Only a copy
    that `parameter.to(dtype)` makes again, stride by stride, is recognised.
    """
    if tensor.dtype not in _LOW_PRECISION:
        return None
    cast = tensor if tensor._base is None else tensor._base
    node = cast.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return None
    if cast._version or tensor.dtype != cast.dtype or tensor.is_neg():
        return None  # changed since, or its bits read as something else
    source = getattr(node.next_functions[0][0], "variable", None)
    if not isinstance(source, torch.Tensor) or source.dtype == cast.dtype:
        return None
    same = (
        source.shape == cast.shape
        and source.stride() == cast.stride()
        and cast.storage_offset() == 0
        # Only bytes in host memory can be compared before they are cast again.
        and source.is_cpu
        and cast.is_cpu
        and cast.data_ptr() % 64 == 0
        # A dense parameter keeps its strides when cast; an expanded one would not.
        and source.untyped_storage().nbytes() >= source.nbytes
        and cast.untyped_storage().nbytes() == cast.nbytes
    )
    return source if same else None
