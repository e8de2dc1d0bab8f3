"""What a backward is expected to want, in which order, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload.activations.plan import Plan
    from offload.activations.recording import Recording
    from offload.activations.region import Region

__all__ = ["BackwardOrder"]


class BackwardOrder:
    """Two places in one order: reading goes ahead of the backward, and arriving between them."""

    def __init__(self, regions: list[Region]) -> None:
        self._regions = regions
        self.order: list[int] = []  # of region numbers, as the backward is expected to want them
        self.used: list[int] = []  # the same, as it really did
        self.read_at = 0  # the next place to read from the SSD
        self.bring_at = 0  # the next place to bring back to a device
        # Places before those two, whose regions left memory only after they had been passed over.
        self._late_to_read: list[int] = []
        self._late_to_bring: list[int] = []
        self.due = math.inf  # the last place that may be back in the computation's memory by now
        self.plan: Plan | None = None

    def expect(self, plan: Plan | None, order: Sequence[int] | None, *, alone: bool) -> bool:
        """Take the order that `plan` has, else `order`, else the reverse of saving.

        Returns whether the plan has reading begin at once: so it does where a forward is `alone`,
        since nothing else but its backward can be next.
        """
        if plan is not None:
            self.plan, order = plan, plan.order
            self.due = plan.due_first if alone else -1
        self.order = list(order) if order is not None else self._reversed()
        for position, number in enumerate(self.order):
            self._regions[number].position = position
        return 0 <= self.due < math.inf

    def _reversed(self) -> list[int]:
        """Return the regions by their last save, the latest first: that node comes first."""
        regions = self._regions
        return sorted(range(len(regions)), key=lambda number: -regions[number].last_save)

    def want(self, region: Region, again: bool, recording: Recording | None) -> None:
        """Note that the backward wants `region` now; what comes next follows from it.

        `again`: by a view that has been asked for before, so it is another backward over a graph
        that was retained.
        """
        position = region.position
        if position < 0:
            return
        if self.plan is not None:
            self.due = max(self.due, self.plan.due[position])
        if not region.used:
            region.used = True
            if recording is not None:
                recording.needed[region.number] = recording.mark()
            self.used.append(region.number)
            self.read_at = max(self.read_at, position + 1)
            self.bring_at = max(self.bring_at, position + 1)
        elif again:
            self.read_at = self.bring_at = position + 1

    def come_back_to(self, region: Region) -> None:
        """Note that `region`, passed over because it was still in memory, has left it by now.

        It is to come back before what comes later takes the room that it needs.
        """
        if region.position < 0 or region.used:
            return
        if region.position < self.read_at:
            heappush(self._late_to_read, region.position)
        if region.position < self.bring_at:
            heappush(self._late_to_bring, region.position)

    def next_to_read(self, room: float = math.inf) -> Region | None:
        """Return the region that the backward should want next of those that must be read.

        Before its time only where it fits into `room`. What is read for another device's memory
        waits in staging, so no schedule holds it back.
        """
        order, regions, late = self.order, self._regions, self._late_to_read
        while late:
            region = regions[order[late[0]]]
            if not region.used and region.may_be_read():
                return region
            heappop(late)
        while self.read_at < len(order):
            region = regions[order[self.read_at]]
            if region.may_be_read():
                early = region.crossing is None and self.read_at > self.due
                return None if early and region.nbytes > room else region
            self.read_at += 1
        return None

    def next_to_bring(self) -> Region | None:
        """Return the region that should come back to its device next, if it is time for any."""
        order, regions, late = self.order, self._regions, self._late_to_bring
        while late:
            region = regions[order[late[0]]]
            if not region.used and region.arrival is None and region.is_away():
                return region
            heappop(late)
        while self.bring_at < len(order) and self.bring_at <= self.due:
            region = regions[order[self.bring_at]]
            if region.crossing is not None and region.arrival is None and region.is_away():
                return region
            self.bring_at += 1
        return None

    def complete(self) -> list[int]:
        """Return the order in which all regions were used, those that never were at the end."""
        if len(self.used) < len(self.order):
            regions = self._regions
            self.used += [number for number in self.order if not regions[number].used]
        return self.used
