"""Where a subgroup's states are: in this process's memory, or on the SSD.

What is updated is a new version, begun from the states as they are. It can be gone on with after an
error until it is committed, and is not let go of before it is where it belongs.
"""

from __future__ import annotations

import errno
import warnings
from typing import Protocol

import torch

from offload.native import Buffer, Extent, tensor_over
from offload.optimizer.layout import Subgroup
from offload.tiers import SsdTier

__all__ = ["HostStates", "SsdStates", "States", "renew_master"]


def renew_master(master_param: torch.Tensor, param: torch.Tensor) -> None:
    """Take over into master copies what somebody else has changed of their parameters.

    Where the parameter is still the copy rounded, it says less than the copy does: a checkpoint's
    parameters may be loaded after its optimizer's states.
    """
    now = param.to(master_param.device)
    same = master_param.to(param.dtype) == now
    master_param.copy_(torch.where(same, master_param, now.float()))


class States(Protocol):
    """The fp32 rows of one subgroup."""

    def prefetch(self) -> bool:
        """Begin to read them, unless they are here; False where there is no room."""

    def read(self) -> torch.Tensor:
        """Return the rows, (`num_rows`, `count`), to be looked at only."""

    def begin(self) -> torch.Tensor:
        """Return the rows of a new version, to be written: equal to the present ones at first.

        The same until it is committed.
        """

    def begin_anew(self) -> torch.Tensor:
        """Return the rows of a new version, all zero, whatever has become of the present one."""

    def commit(self) -> None:
        """Have the new version take the place of the present one."""

    def settle(self) -> None:
        """Wait until the present version is where it belongs."""

    def evict(self) -> None:
        """Give back the staging that it was written from, once it is where it belongs."""

    def memory_bytes(self) -> int:
        """Return what they take in memory between steps, outside of staging."""


class HostStates:
    """States in memory, of the host or of a device, updated where they are."""

    def __init__(self, subgroup: Subgroup, device: torch.device | None = None) -> None:
        self._rows = torch.zeros(subgroup.num_rows, subgroup.count, device=device)

    def prefetch(self) -> bool:
        """Do nothing: they are here."""
        return True

    def read(self) -> torch.Tensor:
        """Return them."""
        return self._rows

    def begin(self) -> torch.Tensor:
        """Return them."""
        return self._rows

    def begin_anew(self) -> torch.Tensor:
        """Return them, all zero."""
        return self._rows.zero_()

    def commit(self) -> None:
        """Do nothing: they are what they are."""

    def settle(self) -> None:
        """Do nothing: they are here."""

    def evict(self) -> None:
        """Do nothing: they are here."""

    def memory_bytes(self) -> int:
        """Return what they take."""
        return self._rows.nbytes


class SsdStates:
    """States on the SSD; zeros until the first version has been committed.

    A new version is made in the staging that the present one was read into, and written elsewhere:
    until it is committed the present one stays on the SSD.
    """

    def __init__(self, subgroup: Subgroup, tier: SsdTier) -> None:
        self._tier = tier
        self._shape = subgroup.num_rows, subgroup.count
        self._nbytes = subgroup.nbytes
        self._present: Extent | None = None
        self._staged: Buffer | None = None
        """The present ones, on the drive or on their way there."""
        self._kept: torch.Tensor | None = None
        """The present ones, where their write has failed."""
        self._next: tuple[Extent, Buffer, torch.Tensor] | None = None

    def prefetch(self) -> bool:
        """Begin to read them into staging, unless they are there; False where it has no room."""
        if self._present is None or self._staged is not None or self._next is not None:
            return True
        return self._present.prefetch()

    def read(self) -> torch.Tensor:
        """Return them, in staging for as long as the tensor lives; raises OSError when lost."""
        if self._kept is not None:
            return self._kept
        if self._present is None:
            return torch.zeros(self._shape)
        return self._over(self._present.fetch() if self._staged is None else self._staged)

    def _over(self, buffer: Buffer) -> torch.Tensor:
        return tensor_over(buffer, torch.float32).view(self._shape)

    def begin(self) -> torch.Tensor:
        """Return them, in staging. Raises OSError where there is no room for another version."""
        if self._next is None:
            there = self._staged
            if there is None and self._present is not None:
                there = self._present.fetch()
            rows = self._begun(there)
            if there is None:
                rows.copy_(self.read())
        assert self._next is not None
        return self._next[2]

    def begin_anew(self) -> torch.Tensor:
        """Return zeros, in staging; what is on the SSD is not read. Raises OSError as `begin`."""
        rows = self._begun(self._staged) if self._next is None else self._next[2]
        return rows.zero_()

    def _begun(self, there: Buffer | None) -> torch.Tensor:
        """Begin a new version in staging, in the present one's where that is `there`."""
        tier = self._tier
        extent = tier.stage(self._nbytes, 0) if there is None else tier.restage(there)
        if not isinstance(extent, Extent):
            raise OSError(errno.ENOSPC, "; ".join(tier.why_full()))
        buffer = extent.staged()
        self._next = extent, buffer, self._over(buffer)
        return self._next[2]

    def commit(self) -> None:
        """Begin to write the new version."""
        assert self._next is not None
        (self._present, self._staged, _), self._next, self._kept = self._next, None, None
        self._present.start_write()

    def settle(self) -> None:
        """Wait until they are on the drive; where they cannot be, they stay in memory."""
        if self._present is None or self._staged is None:
            return
        try:
            self._present.wait_written()
        except OSError as error:
            self._kept = self._over(self._staged).clone()
            self._present = self._staged = None
            self._tier.forget_write_errors()
            said = (
                f"{self._nbytes} bytes of optimizer states stay in memory, since their write failed"
            )
            warnings.warn(f"{said}: {error}", RuntimeWarning, stacklevel=2)

    def evict(self) -> None:
        """Give the staging back, once they are on the drive."""
        self.settle()
        self._staged = None

    def memory_bytes(self) -> int:
        """Return what they take where their write has failed."""
        return self._kept.nbytes if self._kept is not None else 0
