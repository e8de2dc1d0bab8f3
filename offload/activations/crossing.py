"""Regions on their way between a device and host memory, in both directions.

A region leaves by a copy that runs beside the computation; its memory is let go of once the
computation is ordered behind that copy. It comes back the same way: memory for it is taken some
time before it is wanted, and the computation waits for the copy only where it uses it.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from offload.activations.recording import DeviceClock
from offload.activations.stats import LinkFacts
from offload.activations.write_starter import WriteStarter
from offload.device import KERNEL_ALIGN, DeviceLink, Moment, bytes_of
from offload.native import Buffer
from offload.tiers import DirectExtent, DirectTransfer, Staged, Store

if TYPE_CHECKING:
    from offload.activations.region import Region

__all__ = ["Arrival", "Crossing", "Landed"]

# Until a schedule has planned with more.
LEAST_WINDOW_BYTES = 64 << 20
# Waits whose times are not asked for yet; beyond, they are added up.
_MOST_UNTIMED = 256


@dataclass(slots=True)
class _Departure:
    """A storage that must live, as it is, until the computation is ordered behind its copy."""

    region: Region
    storage: torch.UntypedStorage
    address: int
    nbytes: int
    copied: Moment

    def let_go(self) -> None:
        """Take leave of the storage."""
        self.region.leaving = False
        self.region.forward.backward.come_back_to(self.region)
        self.look()

    def look(self) -> None:
        """See whether its owner has emptied the storage: then the bytes may be lost."""
        storage = self.storage
        if storage.nbytes() < self.region.end or storage.data_ptr() != self.address:
            self.region.spoilt = True


class Arrival:
    """Memory on the device for a region that is expected back."""

    __slots__ = ("copied", "free_at", "queue", "tensor")

    def __init__(self, tensor: torch.Tensor, free_at: Moment, queue: Any) -> None:
        self.tensor = tensor
        self.free_at = free_at  # the computation is done with what the memory held before
        self.queue = queue  # whose memory it is
        self.copied: Moment | None = None


class Landed:
    """A region that has come back, and the queues that are ordered behind its copy."""

    __slots__ = ("copied", "queue", "queues")

    def __init__(self, arrival: Arrival, copied: Moment, queue: Any) -> None:
        self.copied = copied
        self.queue = arrival.queue  # whose memory it is
        self.queues = {queue}


class Crossing:
    """The traffic of one link with one or several stores. The owner's lock guards it.

    `window_bytes` bounds the device memory that copies hold: of what leaves until its copy has been
    made, and of what comes back before it is wanted. A single region may be larger. None: as much
    as the schedules in force have planned with.
    """

    def __init__(
        self, link: DeviceLink, stores: dict[str, Store], window_bytes: int | None, pinned: bool
    ) -> None:
        self.link = link
        self._stores = stores
        self._bounded = window_bytes is not None
        self._window_bytes = LEAST_WINDOW_BYTES if window_bytes is None else window_bytes
        self.room_bytes = math.inf
        """What copies may hold within `memory_bytes`, beside all that stays."""
        self._main_queue = link.main_queue()
        self._several_queues = False
        # Waits for copies whose time is not known yet: their begin and end in a queue.
        self._holds: deque[tuple[Any, Any]] = deque()
        self._held_s = 0.0
        self._departing: deque[_Departure] = deque()
        self._departing_bytes = 0
        # Buffers that the device still reads from.
        self._landing: deque[tuple[Moment, Buffer]] = deque()
        # With memory, and their copy not asked for yet.
        self._expected: dict[Region, Arrival] = {}
        self._arriving_bytes = 0
        self.departing_peak_bytes = self.arriving_peak_bytes = 0
        self.unstaged_bytes = 0
        """The largest region that found no room in staging, though the SSD may have had some."""
        self.launched_ahead = 0
        """How many regions were on their way back before they were wanted."""
        self._writes = WriteStarter()
        self._clocks: WeakSet[DeviceClock] = WeakSet()  # of those who record a step
        self.facts = LinkFacts(
            device=str(link.device),
            pinned=pinned,
            pinned_reason=link.pinned_reason,
            device_numa_node=link.numa_node(),
            staging_numa_nodes={name: store.arena.numa_node for name, store in stores.items()},
        )

    def clock(self) -> DeviceClock:
        """Return a clock of the computation, which hears of every wait for a copy."""
        clock = DeviceClock(self.link)
        self._clocks.add(clock)
        return clock

    def _before_waiting(self) -> Any:
        return self.link.mark() if self._clocks else None

    def _waited(self, begin: Any) -> None:
        for clock in self._clocks:
            clock.waited(begin)

    def allow(self, window_bytes: int) -> None:
        """Let copies hold as much as the schedules in force need, unless the user bounds it."""
        if not self._bounded:
            self._window_bytes = max(LEAST_WINDOW_BYTES, window_bytes)

    def wait_within(self, more_bytes: int = 0) -> None:
        """Order the computation behind as many copies as leave too little room for `more_bytes`."""
        while self._departing and (
            self._departing_bytes + more_bytes > self._window_bytes or self._over(more_bytes)
        ):
            self._wait_for_oldest()

    def _over(self, more_bytes: int) -> bool:
        """Say whether copies of both directions would hold more than `memory_bytes` leaves them."""
        return self._departing_bytes + self._arriving_bytes + more_bytes > self.room_bytes

    def held_s(self) -> float:
        """Return for how long the computation has waited for copies, as far as that is known."""
        holds = self._holds
        while holds and holds[0][1].query():
            self._held_s += self.link.elapsed_s(*holds.popleft())
        return self._held_s

    # ---- out ----------------------------------------------------------------------------------

    def send(self, region: Region, storage: torch.UntypedStorage, tier: str) -> Staged | None:
        """Begin to copy a region out; None when its store has no space.

        The storage lives on here for as long as the copy needs it. `tier`: which store, or "" for
        the one that can take it.
        """
        self.link.require_ready()
        self._raise_error()
        self._several_queues |= region.queue != self._main_queue
        self._let_go()
        self.wait_within(region.nbytes)
        lead = (storage.data_ptr() + region.begin) % KERNEL_ALIGN
        extent = self._stage(region.nbytes, lead, tier)
        if extent is None:
            return None
        source = bytes_of(storage, region.begin, region.end)
        copied = self._copy_out(region, source, extent)
        region.residue, region.departed, region.leaving = lead, copied, True
        here = storage.data_ptr()
        self._departing.append(_Departure(region, storage, here, region.nbytes, copied))
        self._departing_bytes += region.nbytes
        self.departing_peak_bytes = max(self.departing_peak_bytes, self._departing_bytes)
        return extent

    def _copy_out(self, region: Region, source: torch.Tensor, extent: Staged) -> Moment:
        if isinstance(extent, DirectExtent):
            queues = {region.queue, self.link.queue()}
            region.extent = extent
            return extent.write_from(source, [self.link.mark(queue) for queue in queues])
        buffer = extent.staged()
        copied = self.link.copy_out(source, buffer, region.queue)
        # The region has its extent before anybody asks whether it still wants it written.
        region.extent = extent
        self._writes.follow(region, extent, buffer, copied)
        return copied

    def _stage(self, nbytes: int, lead: int, tier: str) -> Staged | None:
        names = [tier, *(name for name in self._stores if name != tier)] if tier else self._ranked()
        for name in names:
            store = self._stores.get(name)
            if store is None:
                continue
            if store.direct_way is not None:
                extent: Staged | None = store.stage(nbytes, lead)
            elif nbytes + KERNEL_ALIGN <= store.arena.nbytes:
                self._reclaim(store, nbytes)
                extent = store.stage(nbytes, lead)
            else:
                extent = None
            if extent is not None:
                return extent
            staged = name == "ssd" and store.direct_way is None
            if staged and store.arena.free_bytes < nbytes + KERNEL_ALIGN:
                self.unstaged_bytes = max(self.unstaged_bytes, nbytes)
        return None

    def _reclaim(self, store: Store, nbytes: int) -> None:
        """Wait for what the device still reads from, where `nbytes` need the room."""
        while self._landing and store.arena.free_bytes < nbytes + KERNEL_ALIGN:
            self._landing.popleft()[0].synchronize()

    def _ranked(self) -> list[str]:
        """Return the stores, first the one that keeps up: a split by bandwidth."""
        staging = self._stores.get("ssd")
        if staging is None or 2 * staging.arena.free_bytes >= staging.arena.nbytes:
            return sorted(self._stores, reverse=True)
        return sorted(self._stores)

    def _wait_for_oldest(self) -> None:
        """Order the computation behind a copy, and let go of the memory it was made from."""
        departure = self._departing.popleft()
        self._departing_bytes -= departure.nbytes
        begin = self._before_waiting()
        region = departure.region
        try:
            # The queue on which it was made has the memory back; others may have no part in it.
            self._hold(departure.copied, region.queue)
            if self._several_queues or not region.made_here:
                # It may have been made on another, which does not wait and must not reuse it.
                self.link.leaves(bytes_of(departure.storage, 0, 1))
        finally:
            self._waited(begin)
            departure.let_go()

    def _hold(self, moment: Moment, queue: Any) -> None:
        """Have `queue` go on only after `moment`; a thread's transfer holds up this thread."""
        if isinstance(moment, DirectTransfer):
            moment.hold()  # its way counts how long
            return
        begin = self.link.mark(queue)
        self.link.hold(moment, queue)
        self._holds.append((begin, self.link.mark(queue)))
        if len(self._holds) > _MOST_UNTIMED:
            self.held_s()

    def _let_go(self) -> None:
        """Let go of the memory whose copies have been made."""
        departing = self._departing
        while departing and departing[0].copied.query():
            departure = departing.popleft()
            self._departing_bytes -= departure.nbytes
            departure.let_go()

    def finish(self) -> None:
        """Let go of all that is still leaving: nobody waits for its backward any more."""
        while self._departing:
            with contextlib.suppress(OSError):  # the next who sends or wants something hears of it
                self._wait_for_oldest()

    # ---- back ---------------------------------------------------------------------------------

    def expect(self, region: Region) -> bool:
        """Take memory for a region that will be wanted; False when the window is full."""
        full = self._arriving_bytes + region.nbytes > self._window_bytes
        if (self._arriving_bytes and full) or self._over(region.nbytes):
            return False
        self._expected[region] = self._make_room(region)
        return True

    def _make_room(self, region: Region) -> Arrival:
        tensor = self.link.empty(region.nbytes, region.residue)
        region.arrival = Arrival(tensor, self.link.mark(), self.link.queue())
        self._arriving_bytes += region.nbytes
        self.arriving_peak_bytes = max(self.arriving_peak_bytes, self._arriving_bytes)
        return region.arrival

    def go_on(self) -> list[Region]:
        """Ask for the copies of expected regions whose bytes have come to the host by now.

        Returns those regions.
        """
        self._let_go()
        while self._landing and self._landing[0][0].query():
            self._landing.popleft()
        launched = [
            region for region in self._expected if region.extent is not None and region.extent.ready
        ]
        for region in launched:
            self._launch(region, self._expected[region])
        self.launched_ahead += len(launched)
        return launched

    def _launch(self, region: Region, arrival: Arrival) -> None:
        assert region.extent is not None
        assert region.departed is not None
        self._expected.pop(region, None)
        after = (arrival.free_at, region.departed)
        if isinstance(region.extent, DirectExtent):
            arrival.copied = region.extent.read_into(arrival.tensor, after)
            return
        buffer = region.extent.fetch()
        arrival.copied = self.link.copy_in(buffer, arrival.tensor, after)
        self._landing.append((arrival.copied, buffer))

    def bring(self, region: Region) -> torch.Tensor:
        """Return a region's bytes on the device; the computation waits for them.

        Waits itself until they are in host memory. Raises OSError when they are lost or damaged.
        """
        self._raise_error()
        for departure in self._departing if region.leaving else ():
            if departure.region is region:
                departure.look()
        if region.spoilt:
            raise RuntimeError(
                f"a saved tensor's storage ({region.end} bytes) was emptied by its owner while it "
                "was copied out; empty it after the forward, or keep it out of `act.forward()`"
            )
        while self._departing and self._over(0 if region.arrival else region.nbytes):
            self._wait_for_oldest()
        arrival = region.arrival or self._make_room(region)
        begin = self._before_waiting()
        if arrival.copied is None:
            if "ssd" in self._stores and region.extent is not None and not region.extent.ready:
                self._reclaim(self._stores["ssd"], region.nbytes)
            self._launch(region, arrival)
        assert arrival.copied is not None
        here = self.link.queue()
        self._hold(arrival.copied, here)
        if arrival.queue != here:
            self.link.used_on(arrival.tensor, here)
        self._waited(begin)
        region.landed = Landed(arrival, arrival.copied, here)
        self._arrived(region)
        return arrival.tensor

    def share(self, region: Region, restored: torch.Tensor) -> None:
        """Have this thread's queue use what another one may have brought back."""
        landed, here = region.landed, self.link.queue()
        if landed is None or here in landed.queues:
            return
        begin = self._before_waiting()
        self._hold(landed.copied, here)
        self._waited(begin)
        if here != landed.queue:
            self.link.used_on(restored, here)
        landed.queues.add(here)

    def _arrived(self, region: Region) -> None:
        region.arrival = None
        self._arriving_bytes -= region.nbytes

    def forget(self, region: Region) -> None:
        """Take leave of a region that nobody wants any more."""
        arrival = region.arrival
        if arrival is None:
            return
        self._expected.pop(region, None)
        if arrival.copied is not None:
            # Or the copy would run into what the memory holds next. Nobody wants its bytes.
            with contextlib.suppress(Exception):
                arrival.copied.synchronize()
        self._arrived(region)

    def _raise_error(self) -> None:
        if self._writes.error is not None:
            raise self._writes.error
        for store in self._stores.values():
            if store.direct_way is not None:
                store.direct_way.raise_error()

    def drain(self) -> None:
        """Wait until what has left is in its store, or on its way from there. Without the lock."""
        self._writes.drain()

    def settle(self) -> None:
        """Let go of what has left; raises the error of a copy or of a write's beginning."""
        self._let_go()
        self._raise_error()

    def close(self) -> None:
        """Wait for every copy under way."""
        self._writes.close()
        self.link.close()
        self._departing.clear()
        self._landing.clear()
