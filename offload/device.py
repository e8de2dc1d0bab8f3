"""The one place that knows what kind of device a tensor is on.

On a CPU the device tier is host memory: a region's bytes are copied from where they lie, and
restored tensors live in the staging arena itself. On a GPU they are copied to the host and back on
the current stream, and waited for; nothing overlaps yet.
"""

from __future__ import annotations

import torch

from offload.native import Buffer, tensor_at, tensor_over

__all__ = ["Restored", "can_offload", "device_facts", "host_copy", "materialise", "view_over"]

KERNEL_ALIGN = 64  # kernels choose their path by the address modulo this

Restored = Buffer | torch.Tensor
"""A region's bytes on their device again: a native buffer, or a 1-d uint8 tensor on a GPU."""


def can_offload(tensor: torch.Tensor) -> bool:
    """Say whether this tensor's bytes can be moved from its device and back."""
    return tensor.is_cpu or tensor.is_cuda


def host_copy(storage: torch.UntypedStorage, begin: int, end: int) -> torch.Tensor:
    """Return a copy of the storage's bytes [begin, end) on the host: 1-d, uint8."""
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return flat.set_(storage, begin, (end - begin,), (1,)).cpu()


def materialise(buffer: Buffer, device: torch.device, residue: int) -> Restored:
    """Bring `buffer` to `device`, its first byte at an address equal to `residue` modulo 64.

    On a CPU that is the buffer itself, which was saved with its residue.
    """
    if device.type == "cpu":
        return buffer
    whole = torch.empty(buffer.nbytes + residue, dtype=torch.uint8, device=device)
    return whole[residue:].copy_(tensor_over(buffer, torch.uint8))


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


def device_facts() -> tuple[bool, str]:
    """Say whether torch sees a GPU here, and which or why not."""
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        return False, "torch sees no GPU" if built else "this torch was built without CUDA"
    return True, ", ".join(
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    )
