"""What a device and its host do while states are updated: four queues of copies and one of updates.

Each queue does one thing after the other; what runs after what is said by moments, as CUDA's events
are. Copies of one direction share what the link carries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from offload.device.link import Moment
from offload.native import AdamSettings, ThreadPool, adam_update

__all__ = ["QUEUES", "Arrays", "UpdateDevice"]

QUEUES = ("states in", "states out", "gradients", "parameters", "device")
"""Of copies, to the device and from it, and of updates."""


@dataclass(frozen=True)
class Arrays:
    """What an update works on, all on one side: see `offload.native.adam_update`."""

    grad: torch.Tensor
    master_param: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    param: torch.Tensor | None


class UpdateDevice(ABC):
    """A device, its link to the host, and the host as far as it updates for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def free_bytes(self) -> int:
        """Return how much memory a tensor could still be given there."""

    @abstractmethod
    def ready(self) -> Moment:
        """Return the computation as far as the calling thread has queued it."""

    @abstractmethod
    def copy(
        self, queue: str, source: torch.Tensor, target: torch.Tensor, after: Sequence[Moment]
    ) -> Moment:
        """Copy after those moments; both must live, and stay as they are, until the one returned.

        Each is contiguous and of the other's type; one of them is on the host.
        """

    @abstractmethod
    def update(
        self,
        settings: AdamSettings,
        step: int,
        arrays: Arrays,
        *,
        clip: float,
        after: Sequence[Moment],
    ) -> Moment:
        """Update on the device after those moments; all must live until the one returned."""

    def update_on_host(
        self, pool: ThreadPool, settings: AdamSettings, step: int, arrays: Arrays, *, clip: float
    ) -> None:
        """Update on the host, and return when that is done."""
        adam_update(pool, settings, step, clip=clip, **vars(arrays))

    @abstractmethod
    def squared_norms(self, pool: ThreadPool, values: Sequence[torch.Tensor]) -> list[float]:
        """Return `offload.native.squared_norm` of each array on the device, in the same order."""

    @abstractmethod
    def plain_sums(self, pool: ThreadPool, values: Sequence[torch.Tensor]) -> list[float]:
        """Return `offload.native.plain_sum` of each array on the device, in the same order."""

    @abstractmethod
    def hold(self, moment: Moment) -> None:
        """Have what the calling thread computes from now on go on only after `moment`."""

    @abstractmethod
    def done(self) -> Mapping[str, tuple[float, float]]:
        """Return for each queue what it has done: bytes or parameters, and the seconds it took."""

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> bool:
        """Make host memory fit for copies beside the computation; say whether that worked."""

    @abstractmethod
    def unpin(self, address: int) -> None:
        """Undo `pin`, before the memory goes."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is under way."""
