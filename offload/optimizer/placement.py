"""Which subgroups' states lie where."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from offload.config import OptimizerConfig
from offload.native import FaultPlan
from offload.optimizer.device_side import DeviceSide
from offload.optimizer.layout import Subgroup
from offload.optimizer.states import HostStates, SsdStates, States
from offload.tiers import SsdTier

__all__ = ["Placement"]

PAD_BYTES = 8192  # that each takes in staging beside its own
# The versions of one subgroup that are in staging at once: as it was, as it becomes, on its way.
_VERSIONS = 3


class Placement:
    """Owns the tiers that an optimizer's states lie on.

    Raises OSError with errno and path for a directory that cannot be used.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        faults: FaultPlan | None = None,
        side: DeviceSide | None = None,
    ) -> None:
        self._config, self._side = config, side
        self._shares = config.shares
        self._tier = SsdTier(config, faults) if "ssd" in self._shares else None
        self._needed_bytes = 0  # on the SSD
        self.depth = 0
        """How many subgroups may be on their way, in each direction, beside the one in work."""

    def states_of(self, subgroups: Sequence[Subgroup]) -> list[States]:
        """Return the states of each, all zero. Raises OSError where the SSD has too few bytes."""
        total = sum(subgroup.nbytes for subgroup in subgroups)
        # The first part on the SSD: what is in memory is updated while the last of it is written.
        on_ssd = self._shares.get("ssd", 0.0) * total
        # And the last part on the device: what has moved comes back while that is updated.
        on_device = (1 - self._shares.get("device", 0.0)) * total
        out: list[Subgroup] = []
        taken, resident = 0.0, []
        for subgroup in subgroups:
            if taken + subgroup.nbytes / 2 <= on_ssd:
                out.append(subgroup)
            resident.append(taken + subgroup.nbytes / 2 > on_device)
            taken += subgroup.nbytes
        states: list[States] = []
        if self._tier is not None and out:
            self._take_room(self._tier, [subgroup.nbytes for subgroup in out])
            states += [SsdStates(subgroup, self._tier) for subgroup in out]
        for subgroup, stays in zip(subgroups[len(states) :], resident[len(states) :], strict=True):
            if self._side is not None:
                states.append(self._side.states_of(subgroup, resident=stays))
            else:
                states.append(HostStates(subgroup))
        return states

    def _take_room(self, tier: SsdTier, sizes: Sequence[int]) -> None:
        staging, largest = tier.arena.nbytes, max(sizes)
        if _VERSIONS * (largest + PAD_BYTES) > staging:
            raise ValueError(
                f"staging_bytes={staging} cannot hold {_VERSIONS} versions of a subgroup of "
                f"{largest} bytes; give more, or a smaller subgroup_params"
            )
        # The old version stays until the new one is there.
        needed_bytes, limit = self._needed_bytes + 2 * sum(sizes), tier.limit_bytes()
        if needed_bytes > limit:
            raise OSError(
                errno.ENOSPC,
                f"the states need {needed_bytes} bytes on the SSD, two versions of each, "
                f"but there are {limit} (spill_bytes, or half of what is free)",
                self._config.path[0],
            )
        self._needed_bytes = needed_bytes
        # Beside two versions of the one in work: some come, and as many go.
        depth = max(1, (staging // (largest + PAD_BYTES) - 2) // 2)
        self.depth = min(self.depth, depth) if self.depth else depth

    def native_bytes(self) -> int:
        """Return what staging takes in memory."""
        return int(self._tier.counters()["native_bytes"]) if self._tier is not None else 0

    def close(self) -> None:
        """Wait for the I/O and free the space."""
        if self._side is not None:
            self._side.close()
        if self._tier is not None:
            self._tier.close()
