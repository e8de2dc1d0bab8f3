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
    Extent,
    FaultPlan,
    FaultRule,
    Spill,
    crc32c,
    crc32c_path,
)
from offload._C import inspect_directory as _inspect_directory
from offload._C import probe_engines as _probe_engines

__all__ = [
    "Arena",
    "Buffer",
    "DirectoryFacts",
    "Extent",
    "FaultPlan",
    "FaultRule",
    "Spill",
    "crc32c",
    "crc32c_path",
    "inspect_directory",
    "probe_engines",
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


def tensor_over(buffer: Buffer, dtype: torch.dtype) -> torch.Tensor:
    """Return a 1-d tensor over the whole elements of `buffer`, which it keeps alive."""
    return torch.frombuffer(buffer, dtype=dtype, count=buffer.nbytes // dtype.itemsize)
