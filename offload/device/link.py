"""The way between a device's memory and the host's, beside the computation.

Copies out and copies in have a queue each. What runs after what is said by moments: points in a
queue, as CUDA's events are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from offload.device.direct import DirectFile
from offload.native import Buffer

__all__ = ["KERNEL_ALIGN", "DeviceLink", "Moment", "bytes_of"]

KERNEL_ALIGN = 64  # kernels choose their path by the address modulo this


class Moment(Protocol):
    """A point in a queue of a device. `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Say whether all before it has been done."""

    def synchronize(self) -> None:
        """Return when all before it has been done."""


class DeviceLink(ABC):
    """Copies between one device and host memory. `computation`: what the calling thread queues."""

    pinned_reason: str = ""
    """Whether host memory is pinned for it, and why or why not."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def queue(self) -> Any:
        """Return the device's queue that the calling thread computes on."""

    @abstractmethod
    def main_queue(self) -> Any:
        """Return the queue that a thread computes on unless it chose another one."""

    @abstractmethod
    def require_ready(self) -> None:
        """Raise RuntimeError where the computation is not one that copies can be part of."""

    @abstractmethod
    def copy_out(self, source: torch.Tensor, target: Buffer, made_on: Any) -> Moment:
        """Copy `source` (1-d, uint8) to `target`, after all that the computation has queued.

        `made_on`: the queue on which it was made, which may be another one than that of the calling
        thread. Both must live, and `source` stay as it is, until the moment that is returned.
        """

    @abstractmethod
    def copy_in(self, source: Buffer, target: torch.Tensor, after: Sequence[Moment]) -> Moment:
        """Copy `source` to `target` (1-d, uint8) after those moments; both must live until then."""

    @abstractmethod
    def mark(self, queue: Any = None) -> Any:
        """Return a moment of the computation as far as it is queued; see `elapsed_s`.

        `queue`: which one's, if not that of the calling thread.
        """

    @abstractmethod
    def hold(self, moment: Moment, queue: Any) -> None:
        """Have `queue` go on only after `moment`, from what is queued there next."""

    @abstractmethod
    def used_on(self, tensor: torch.Tensor, queue: Any) -> None:
        """Say that `tensor`, whose memory was taken on another queue, is used on this one."""

    @abstractmethod
    def leaves(self, tensor: torch.Tensor) -> None:
        """Say that copies out read `tensor`, whose memory may have been taken on any queue."""

    @abstractmethod
    def elapsed_s(self, begin: Any, end: Any) -> float:
        """Return the seconds between two marks, waiting until both have passed."""

    @abstractmethod
    def transferred(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return what was copied out and in: bytes, and seconds that it took."""

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> bool:
        """Make host memory fit for copies beside the computation; say whether that worked."""

    @abstractmethod
    def unpin(self, address: int) -> None:
        """Undo `pin`, before the memory goes."""

    def direct_file(self, descriptor: int) -> DirectFile:
        """Return the file that is open under `descriptor`, as the device's memory reaches it.

        Raises OSError where it does not, ImportError where what it takes is not installed.
        """
        raise OSError(f"nothing leads from {self.device} to a file but host memory")

    def numa_node(self) -> int:
        """Return the NUMA node that the device is attached to, or -1."""
        return -1

    @abstractmethod
    def close(self) -> None:
        """Wait for what is under way."""

    def empty(self, nbytes: int, residue: int) -> torch.Tensor:
        """Return memory of the device whose address equals `residue` modulo 64: 1-d, uint8."""
        whole = torch.empty(nbytes + residue, dtype=torch.uint8, device=self.device)
        return whole[residue:]


def bytes_of(storage: torch.UntypedStorage, begin: int, end: int) -> torch.Tensor:
    """Return the storage's bytes [begin, end) as a tensor over them: 1-d, uint8."""
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return flat.set_(storage, begin, (end - begin,), (1,))
