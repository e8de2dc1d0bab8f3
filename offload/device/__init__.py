"""What differs between devices: where tensors' bytes are, and how they get to host memory.

On a CPU the device tier is host memory: a region's bytes are copied from where they lie, and
restored tensors live in the staging arena itself. Other devices have a `DeviceLink`, by which bytes
cross while the device computes.
"""

from __future__ import annotations

import os

import torch

from offload.device.cuda import CudaLink, device_facts, is_capturing, refuse_capture
from offload.device.direct import DirectFile, direct_facts, require_direct
from offload.device.emulated import EmulatedLink
from offload.device.link import KERNEL_ALIGN, DeviceLink, Moment, bytes_of
from offload.native import Buffer, tensor_at

__all__ = [
    "KERNEL_ALIGN",
    "CudaLink",
    "DeviceLink",
    "DirectFile",
    "EmulatedLink",
    "Moment",
    "Restored",
    "bytes_of",
    "can_offload",
    "default_generators",
    "device_facts",
    "direct_facts",
    "has_gpu",
    "is_capturing",
    "num_devices",
    "refuse_capture",
    "require_direct",
    "view_over",
]

_DRIVERS_GPUS = "/proc/driver/nvidia/gpus"

Restored = Buffer | torch.Tensor
"""A region's bytes on their device again: a native buffer, or a 1-d uint8 tensor across a link."""


def can_offload(tensor: torch.Tensor) -> bool:
    """Say whether this tensor's bytes can be moved from its device and back."""
    return tensor.is_cpu or tensor.is_cuda


def num_devices() -> int:
    """Return how many GPUs the ranks of this machine have, one of which may see only its own."""
    try:
        all_of_them = len(os.listdir(_DRIVERS_GPUS))
    except OSError:
        all_of_them = 0
    return max(torch.cuda.device_count(), all_of_them)


def has_gpu() -> bool:
    """Say whether there is a GPU to compute on."""
    return torch.cuda.is_available()


def default_generators() -> tuple[torch.Generator, ...]:
    """Return the generators that draw where nobody names one: the host's, and each GPU's in use."""
    return torch.default_generator, *torch.cuda.default_generators


def view_over(
    restored: Restored,
    dtype: torch.dtype,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    first_byte: int,
) -> torch.Tensor:
    """Return a tensor over restored bytes, which it keeps alive."""
    if isinstance(restored, torch.Tensor):
        tensor = torch.empty(0, dtype=dtype, device=restored.device)
        storage = restored.untyped_storage()
        first_byte += int(restored.storage_offset())
        if first_byte % dtype.itemsize:
            raise RuntimeError(f"a restored {dtype} would begin at byte {first_byte}")
        return tensor.set_(storage, first_byte // dtype.itemsize, size, stride)
    return tensor_at(restored, dtype, size, stride, first_byte)
