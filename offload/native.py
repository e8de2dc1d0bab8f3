"""The one door to the native core: addresses of tensors, facts of directories, fault scripts.

Only this module imports `offload._C`. Tensors become addresses here and nowhere else.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from offload._C import (
    Arena,
    Buffer,
    DropBox,
    Extent,
    FaultPlan,
    FaultRule,
    HeldKeys,
    HookScope,
    SavedView,
    Spill,
    TryLock,
    close_in_children,
    crc32c,
    crc32c_path,
    keep_in_children,
)
from offload._C import inspect_directory as _inspect_directory
from offload._C import probe_engines as _probe_engines

__all__ = [
    "Arena",
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
    "TryLock",
    "close_in_children",
    "crc32c",
    "crc32c_path",
    "inspect_directory",
    "keep_in_children",
    "probe_engines",
    "tensor_at",
    "tensor_over",
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
