"""The one door to the native core: addresses of tensors, facts of directories, fault scripts.

Only this module imports `offload._C`. Tensors become addresses here and nowhere else.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, replace

import torch
from torch.autograd.graph import increment_version

from offload._C import (
    NORM_BLOCK,
    AdamSettings,
    Arena,
    AttentionShape,
    Buffer,
    DropBox,
    Extent,
    FaultPlan,
    FaultRule,
    HeldKeys,
    HookScope,
    SavedView,
    Spill,
    ThreadPool,
    TryLock,
    adam_constants,
    adam_path,
    close_in_children,
    crc32c,
    crc32c_path,
    keep_in_children,
    sum_of_blocks,
)
from offload._C import adam_update as _adam_update
from offload._C import block_attention as _block_attention
from offload._C import block_attention_backward as _block_attention_backward
from offload._C import block_pair_scores as _block_pair_scores
from offload._C import inspect_directory as _inspect_directory
from offload._C import plain_sum as _plain_sum
from offload._C import probe_engines as _probe_engines
from offload._C import squared_norm as _squared_norm

__all__ = [
    "NORM_BLOCK",
    "AdamSettings",
    "Arena",
    "AttentionBlocks",
    "Buffer",
    "DirectoryFacts",
    "DropBox",
    "Extent",
    "FaultPlan",
    "FaultRule",
    "HeldKeys",
    "HookScope",
    "SavedView",
    "Spill",
    "ThreadPool",
    "TryLock",
    "adam_constants",
    "adam_path",
    "adam_update",
    "block_attention",
    "block_attention_backward",
    "block_pair_scores",
    "close_in_children",
    "crc32c",
    "crc32c_path",
    "inspect_directory",
    "keep_in_children",
    "memory_of",
    "note_updated",
    "plain_sum",
    "probe_engines",
    "squared_norm",
    "sum_of_blocks",
    "tensor_at",
    "tensor_over",
    "update_addresses",
]


@dataclass(frozen=True)
class DirectoryFacts:
    """What a directory can keep of the promises made for spilled tensors."""

    path: str
    filesystem: str
    backing: str
    """`disk`, `memory` (tmpfs, ramfs) or `network`."""
    free_bytes: int
    total_bytes: int
    direct: bool
    direct_reason: str


def inspect_directory(path: str | os.PathLike[str]) -> DirectoryFacts:
    """Look at `path`: its file system by statfs type, its free space, and whether O_DIRECT works.

    Raises FileNotFoundError, NotADirectoryError, PermissionError or another OSError with the path.
    """
    return DirectoryFacts(*_inspect_directory(os.fspath(path)))


def probe_engines() -> dict[str, tuple[bool, str]]:
    """Say for each I/O engine whether this machine has it, and why."""
    return _probe_engines()


# DLPack's type code and width. What is not here (float8 and the like) not every torch takes.
_DLPACK_TYPES = {
    torch.bool: (6, 8),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.complex64: (5, 64),
    torch.complex128: (5, 128),
}
# torch.from_dlpack() does the same after looking for a protocol that a capsule does not have.
_from_dlpack = torch._C._from_dlpack


def tensor_over(buffer: Buffer, dtype: torch.dtype) -> torch.Tensor:
    """Return a 1-d tensor over the whole elements of `buffer`, which it keeps alive."""
    return torch.frombuffer(buffer, dtype=dtype, count=buffer.nbytes // dtype.itemsize)


def tensor_at(
    buffer: Buffer,
    dtype: torch.dtype,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    first_byte: int,
) -> torch.Tensor:
    """Return a tensor over `buffer` from `first_byte` on; it keeps the memory alive.

    `first_byte`, a multiple of the element's size, becomes the storage offset. Raises ValueError or
    RuntimeError when the tensor would reach beyond the end.
    """
    kind = _DLPACK_TYPES.get(dtype)
    if kind is not None and not first_byte:
        tensor: torch.Tensor = _from_dlpack(buffer.dlpack(*kind, size, stride))
        return tensor
    return tensor_over(buffer, dtype).as_strided(size, stride, first_byte // dtype.itemsize)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the host, to be read and written.

    The caller keeps the tensor alive meanwhile. Raises ValueError for other tensors.
    """
    address = _array("tensor", tensor, tuple(_DLPACK_TYPES))
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(address)).cast("B")


_ARITHMETIC_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_HOST = torch.device("cpu")


def _array(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device = _HOST
) -> int:
    """Return the address of a tensor's elements, which lie on `device` one after the other."""
    if tensor.dtype not in dtypes:
        allowed = ", ".join(map(_dtype_name, dtypes))
        raise ValueError(f"{name} is {_dtype_name(tensor.dtype)}; it can be {allowed}")
    if tensor.is_neg():
        raise ValueError(f"{name} is a view that negates its memory; pass its resolve_neg()")
    if tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is on {tensor.device} with strides {tuple(tensor.stride())}; it has to lie "
            f"on {'the host' if device == _HOST else device}, its elements one after the other"
        )
    return tensor.data_ptr()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def adam_update(
    pool: ThreadPool,
    settings: AdamSettings,
    step: int,
    *,
    grad: torch.Tensor,
    master_param: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    param: torch.Tensor | None = None,
    grad_scale: float = 1.0,
    clip: float = 1.0,
    version: str | None = None,
) -> None:
    """Update `master_param` and the moments in place by AdamW; `param` is their rounded copy.

    All tensors are the caller's, of one size, contiguous, on the host and apart from each other:
    `master_param` and the moments float32, `grad` and `param` float32, bfloat16 or float16. `step`
    counts from 1. Gradients are divided by `grad_scale` and multiplied by `clip` first. The bits do
    not depend on threads or processor; `version` runs another one than `adam_path()`'s, of this
    processor. Releases the GIL. Raises ValueError for other tensors or versions.
    """
    arrays = (grad, master_param, exp_avg, exp_avg_sq, param)
    addresses = update_addresses(*arrays)
    _adam_update(
        pool,
        settings,
        step,
        grad_scale=grad_scale,
        clip=clip,
        grad_dtype=_dtype_name(grad.dtype),
        param_dtype=_dtype_name(torch.float32 if param is None else param.dtype),
        count=grad.numel(),
        version=version,
        **addresses,
    )
    note_updated(*arrays[1:])


def update_addresses(
    grad: torch.Tensor,
    master_param: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    param: torch.Tensor | None,
    device: torch.device = _HOST,
) -> dict[str, int]:
    """Return the addresses of what an update works on, by name; 0 where there is no `param`.

    Raises ValueError for tensors that `adam_update` would not take, were they on the host.
    """
    state = {"master_param": master_param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    others = {"grad": grad} if param is None else {"grad": grad, "param": param}
    for name, each in (state | others).items():
        if each.numel() != grad.numel():
            raise ValueError(f"{name} has {each.numel()} elements, but grad {grad.numel()}")
    addresses = {name: _array(name, each, (torch.float32,), device) for name, each in state.items()}
    for name, each in others.items():
        addresses[name] = _array(name, each, _ARITHMETIC_DTYPES, device)
    return {"param": 0} | addresses


def note_updated(*arrays: torch.Tensor | None) -> None:
    """Have whoever saved one of them for a backward hear that it was changed."""
    changed = [each for each in arrays if each is not None and not each.is_inference()]
    increment_version(changed)


def plain_sum(pool: ThreadPool, values: torch.Tensor, version: str | None = None) -> float:
    """Return the sum of a contiguous tensor on the host, otherwise as `squared_norm`."""
    address = _array("values", values, _ARITHMETIC_DTYPES)
    return _plain_sum(pool, address, _dtype_name(values.dtype), values.numel(), version)


def squared_norm(pool: ThreadPool, values: torch.Tensor, version: str | None = None) -> float:
    """Return the sum of squares of a contiguous tensor on the host, in double precision.

    Added up in one order, whatever the threads and the processor. Infinite or NaN where an element
    is, and only there. `version` is as in `adam_update`. Releases the GIL. Raises ValueError for
    other tensors or versions.
    """
    address = _array("values", values, _ARITHMETIC_DTYPES)
    return _squared_norm(pool, address, _dtype_name(values.dtype), values.numel(), version)


@dataclass(frozen=True)
class AttentionBlocks:
    """Which blocks of a sequence attend to which; on the host, owned by the caller."""

    rows: torch.Tensor
    """[batch, count] int32, ascending numbers of blocks."""
    columns: torch.Tensor
    """[batch, count] int32, ascending numbers of blocks."""
    block_tokens: int
    scale: float
    documents: torch.Tensor | None = None
    """[batch, sequence] int32: tokens attend within their own; None: all are of one."""
    window: int = 0
    """How many tokens each attends to at most, itself included; 0: all before it."""

    def on(self, device: torch.device) -> AttentionBlocks:
        """Return the same, its tensors on `device`: for a kernel of that one's."""
        own = self.documents
        return replace(
            self,
            rows=self.rows.to(device),
            columns=self.columns.to(device),
            documents=None if own is None else own.to(device),
        )

    def lists(self) -> tuple[int, int, int, int]:
        """Return addresses and counts, as the native functions take them."""
        address = {
            name: _array(name, getattr(self, name), (torch.int32,)) for name in ("rows", "columns")
        }
        return address["rows"], self.rows.shape[1], address["columns"], self.columns.shape[1]

    def shape(self, query: torch.Tensor, key: torch.Tensor) -> AttentionShape:
        """Return the sizes of an attention of these two."""
        documents = self.documents
        return AttentionShape(
            batch=query.shape[0],
            heads=query.shape[1],
            key_heads=key.shape[1],
            length=key.shape[2],
            channels=query.shape[3],
            block_tokens=self.block_tokens,
            scale=self.scale,
            documents=0 if documents is None else _array("documents", documents, (torch.int32,)),
            window=self.window,
        )


def _heads(name: str, tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """Return address and strides of [batch, heads, rows, channels] in fp32 on the host."""
    if tensor.dtype != torch.float32 or tensor.device != _HOST or tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} is {_dtype_name(tensor.dtype)} on {tensor.device} with strides "
            f"{tuple(tensor.stride())}; it has to be float32 on the host, channels side by side"
        )
    batch, head, row, _ = tensor.stride()
    return tensor.data_ptr(), batch, head, row


def block_attention(
    pool: ThreadPool,
    blocks: AttentionBlocks,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write attention of the rows' blocks over the columns', read where they lie.

    `query`, `key` and `value` are [batch, heads, sequence, channels], whole; `out` has the rows'
    blocks side by side, and `lse` [batch, heads, as many] each row's logarithm of its sum. Whoever
    calls has checked that numbers of blocks are the sequence's. Releases the GIL.
    """
    given = (_heads("query", query), _heads("key", key), _heads("value", value))
    sums = _array("lse", lse, (torch.float32,))
    shape = blocks.shape(query, key)
    _block_attention(pool, shape, *blocks.lists(), *given, _heads("out", out), sums)


def block_attention_backward(
    pool: ThreadPool,
    blocks: AttentionBlocks,
    forward: tuple[torch.Tensor, ...],
    grad_out: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Write gradients of query, and add those of key and value, with their blocks side by side.

    `forward` is query, key, value, out and lse, as `block_attention` had them. Releases the GIL.
    """
    query, key, value, out, lse = forward
    named = {"query": query, "key": key, "value": value, "out": out}
    q, k, v, o = (_heads(name, each) for name, each in named.items())
    sums = _array("lse", lse, (torch.float32,))
    names = ("grad_query", "grad_key", "grad_value")
    from_above = _heads("grad_out", grad_out)
    to_q, to_k, to_v = (_heads(*each) for each in zip(names, grads, strict=True))
    shape = blocks.shape(query, key)
    _block_attention_backward(
        pool, shape, *blocks.lists(), q, k, v, o, sums, from_above, to_q, to_k, to_v
    )


def block_pair_scores(
    pool: ThreadPool,
    blocks: AttentionBlocks,
    query: torch.Tensor,
    key: torch.Tensor,
    scores: torch.Tensor,
    *,
    ahead: bool,
) -> None:
    """Write the scores of all pairs of blocks, [batch, blocks, blocks], -1 where no pair counts.

    `ahead`: of queries with later keys. Releases the GIL.
    """
    address = _array("scores", scores, (torch.float32,))
    given = (_heads("query", query), _heads("key", key))
    _block_pair_scores(pool, blocks.shape(query, key), ahead, *given, address)
