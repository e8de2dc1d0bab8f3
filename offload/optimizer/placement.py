"""Which subgroups' states lie where."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from offload.config import OptimizerConfig
from offload.native import FaultPlan
from offload.optimizer.device_side import DeviceSide
from offload.optimizer.layout import Subgroup
from offload.optimizer.states import HostStates, SsdStates, States
from offload.tiers import SsdTier
from offload.tiers.memory import available_bytes
from perfmodel.plan import PAGE_BYTES
from perfmodel.schedules.subgroup_size import LEAST_STAGED, PAD_BYTES

__all__ = ["Placement"]

_MOST_AHEAD = 8


def on_drive(nbytes: int) -> int:
    """Return what so many bytes take in a file: whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


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
        self._process = os.getpid()
        self._shares = config.shares
        self._tier = SsdTier(config, faults) if "ssd" in self._shares else None
        self._needed_bytes = 0  # on the SSD
        self.ahead = 0
        """How many subgroups may be read ahead of the one in work."""
        self._most_staged = 0
        self._staged: deque[SsdStates] = deque()  # updated, in this order
        self._backwards = False

    def require_owner(self) -> None:
        """Raise RuntimeError in a forked child, which has no part in what is on the SSD."""
        if self._tier is not None and self._process != os.getpid():
            raise RuntimeError(
                f"the states of this AdamW belong to process {self._process}; a forked child has "
                "to make its own"
            )

    def states_of(self, subgroups: Sequence[Subgroup]) -> list[States]:
        """Return the states of each, all zero. Raises OSError where the SSD has too few bytes."""
        if self._side is not None:
            self._side.replan()  # its schedule is for fewer
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
        in_memory = [*zip(subgroups[len(out) :], resident[len(out) :], strict=True)]
        self._require_memory(in_memory)
        states: list[States] = []
        if self._tier is not None and out:
            self._take_room(self._tier, [subgroup.nbytes for subgroup in out])
            states += [SsdStates(subgroup, self._tier) for subgroup in out]
        for subgroup, stays in in_memory:
            if self._side is not None:
                states.append(self._side.states_of(subgroup, resident=stays))
            else:
                states.append(HostStates(subgroup))
        return states

    def _require_memory(self, subgroups: Sequence[tuple[Subgroup, bool]]) -> None:
        """Raise MemoryError where states need more than there is now, on the host or a device."""
        there = {
            "host": available_bytes(),
            "device": self._side.free_bytes() if self._side is not None else available_bytes(),
        }
        for tier, stays in (("host", False), ("device", True)):
            nbytes = sum(
                subgroup.nbytes
                for subgroup, resident in subgroups
                if (resident and self._side is not None) is stays
            )
            if nbytes > there[tier]:
                raise MemoryError(
                    f"placement={self._config.placement!r} puts {nbytes} bytes of states on the "
                    f"{tier}, where {there[tier]} are available; give a part to another tier, as "
                    "in 'host=0.4,ssd=0.6'"
                )

    def _take_room(self, tier: SsdTier, sizes: Sequence[int]) -> None:
        staging, largest = tier.arena.nbytes, max(sizes)
        slots = staging // (largest + PAD_BYTES)
        if slots < LEAST_STAGED:
            raise ValueError(
                f"staging_bytes={staging} is too little: {LEAST_STAGED} subgroups of {largest} "
                f"bytes need {LEAST_STAGED * (largest + PAD_BYTES)}, padding included; give "
                "that, or a smaller subgroup_params"
            )
        # The old version stays until the new one is there.
        needed_bytes, limit = self._needed_bytes + 2 * sum(map(on_drive, sizes)), tier.limit_bytes()
        if needed_bytes > limit:
            raise OSError(
                errno.ENOSPC,
                f"the states need {needed_bytes} bytes on the SSD, two versions of each, "
                f"but there are {limit} (spill_bytes, or half of what is free)",
                self._config.path[0],
            )
        self._needed_bytes = needed_bytes
        ahead = min(slots // LEAST_STAGED, _MOST_AHEAD)
        self.ahead = min(self.ahead, ahead) if self.ahead else ahead
        # Beside those and the one in work. What is staged at a step's end need not be read in the
        # next one, which begins with it.
        staged = slots - 1 - self.ahead
        self._most_staged = min(self._most_staged, staged) if self._most_staged else staged
        self._evict(self._most_staged)

    def updated(self, states: States) -> None:
        """Say that these have a new version, which stays staged while there is room."""
        if not isinstance(states, SsdStates):
            return
        if states in self._staged:
            self._staged.remove(states)
        self._staged.append(states)
        self._evict(self._most_staged)

    def begin(self, states: States) -> torch.Tensor:
        """Return `states.begin()`; what has stayed staged goes where it is in the way.

        Raises OSError where there is no room all the same, or they cannot be read.
        """
        while not states.prefetch() and self._staged:
            self._evict(len(self._staged) - 1)
        try:
            return states.begin()
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._staged:
                raise
            self._evict(0)
            return states.begin()

    def _evict(self, most: int) -> None:
        while len(self._staged) > most:
            self._staged[0].evict()
            self._staged.popleft()

    def order(self, states: Sequence[States]) -> list[int]:
        """Return the numbers of states as a step goes through them: those still staged come first.

        Those in memory come last, while what has been updated is written.
        """
        out = [number for number, each in enumerate(states) if isinstance(each, SsdStates)]
        here = [number for number, each in enumerate(states) if not isinstance(each, SsdStates)]
        return [*(reversed(out) if self._backwards else out), *here]

    def turn(self) -> None:
        """Say that a step has gone through all of them: the next one goes the other way."""
        self._backwards = not self._backwards

    def settle(self) -> None:
        """Wait until all states are where they belong."""
        for states in self._staged:
            states.settle()

    def let_go(self) -> None:
        """Have nothing stay staged: all of it is about to become something else."""
        self._evict(0)

    def native_bytes(self) -> int:
        """Return what staging takes in memory."""
        return int(self.counters()["native_bytes"])

    def counters(self) -> Mapping[str, int | float]:
        """Return those of `SsdTier`."""
        return self._tier.counters() if self._tier is not None else SsdTier.NOTHING

    def close(self) -> None:
        """Wait for the I/O and free the space."""
        self._staged.clear()
        if self._side is not None:
            self._side.close()
        if self._tier is not None:
            self._tier.close()
