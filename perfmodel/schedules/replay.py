"""What a choice of tiers does: when each tensor is written and read, and the memory that remains.

A channel serves one transfer at a time. Reads come first: each ends when its tensor is needed and
begins as late as the reads after it allow. Writes take the time in between, in the order of saving.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perfmodel.schedules.trace import Channel, Limits, Trace, peak_of

__all__ = ["KEPT", "Outcome", "Replay"]

KEPT = -1
"""A choice: the tensor stays where it is. Other choices are indices of channels."""

# Sums of times differ in the last bits depending on their order.
_SLACK_S = 1e-12


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a choice. `broken`: a tensor that cannot leave as chosen, or -1 when all can."""

    broken: int
    peak_bytes: int = 0
    staging_peak_bytes: int = 0
    """Of what is limited; 0 where it is not."""
    moved_bytes: int = 0
    byte_seconds: float = 0.0
    """How much is in memory for how long, less the same when all is kept."""
    written_s: Sequence[float] = ()
    """When each tensor's write has ended; infinite for those that are kept."""
    read_s: Sequence[float] = ()
    """When each tensor's read begins; infinite for those that are kept."""


class Replay:
    """A trace, channels and limits, against which many choices are tried."""

    def __init__(self, trace: Trace, channels: Sequence[Channel], limits: Limits) -> None:
        tensors = trace.tensors
        self.trace = trace
        self.channels = tuple(channels)
        self.limits = limits
        self.nbytes = [tensor.nbytes for tensor in tensors]
        self.saved_s = [tensor.saved_s for tensor in tensors]
        self.needed_s = [tensor.needed_s for tensor in tensors]
        self.released_s = [tensor.released_s for tensor in tensors]
        self.movable = [
            not tensor.held and tensor.nbytes >= max(1, limits.min_tensor_bytes)
            for tensor in tensors
        ]
        self._shared = trace.shared()
        for members in self._shared:
            movable = all(self.movable[index] for index in members)
            for index in members:
                self.movable[index] = movable
        self._whole = [tensor.nbytes + tensor.rest_bytes for tensor in tensors]
        self._ends_s = trace.ends_s()
        # Whatever leaves, what comes back is released as it would have been.
        self._plain = self._whole == self.nbytes and self._ends_s == self.released_s
        self._saves = list(zip(self.saved_s, self._whole, strict=True))
        self._releases = sorted(zip(self.released_s, self.nbytes, strict=True))
        self._by_need = sorted(range(len(tensors)), key=self.needed_s.__getitem__)
        self._seconds: dict[tuple[int, bool], tuple[list[float], list[float]]] = {}

    def seconds(self, number: int, mixed: bool) -> tuple[list[float], list[float]]:
        """Return how long the write and the read of each tensor take on a channel.

        `mixed`: while transfers of the other direction are under way as well.
        """
        key = number, mixed
        if key not in self._seconds:
            channel = self.channels[number]
            self._seconds[key] = (
                [channel.write_s(nbytes, mixed) for nbytes in self.nbytes],
                [channel.read_s(nbytes, mixed) for nbytes in self.nbytes],
            )
        return self._seconds[key]

    def tied(self, choice: Sequence[int]) -> Sequence[int]:
        """Return `choice` with all of a storage kept where some is, which would free nothing."""
        if not self._shared:
            return choice
        tied = list(choice)
        for members in self._shared:
            if any(choice[index] == KEPT for index in members):
                for index in members:
                    tied[index] = KEPT
        return tied

    def _freed_s(self, written_s: Sequence[float]) -> Sequence[float]:
        """Return when the memory of each is free: once all of its storage has been written."""
        if not self._shared:
            return written_s
        freed_s = list(written_s)
        for members in self._shared:
            last_s = max(written_s[index] for index in members)
            for index in members:
                freed_s[index] = last_s
        return freed_s

    def run(self, choice: Sequence[int]) -> Outcome:
        """Say what `choice` (a channel or KEPT for each tensor) does when nothing may wait.

        Of a storage all leave or none: see `tied`.
        """
        choice = self.tied(choice)
        count = len(self.nbytes)
        written_s, read_s = [math.inf] * count, [math.inf] * count
        moved_bytes = 0
        for number, channel in enumerate(self.channels):
            mine = [index for index in range(count) if choice[index] == number]
            if not mine:
                continue
            reads = [index for index in self._by_need if choice[index] == number]
            broken = self._transfer(mine, reads, number, written_s, read_s)
            if broken < 0:
                broken = self._over_capacity(mine, channel)
            if broken >= 0:
                return Outcome(broken)
            moved_bytes += sum(self.nbytes[index] for index in mine)
        moved = [index for index in range(count) if choice[index] != KEPT]
        staged = [index for index in moved if self.channels[choice[index]].staged]
        broken, staging_peak = -1, 0
        if staged and self.limits.staging_bytes < math.inf:
            broken, staging_peak = self._staging(staged, written_s, read_s)
        if broken < 0 and self.limits.window_bytes < math.inf:
            broken, _ = self.window(moved, written_s, read_s, self.limits.window_bytes)
        if broken >= 0:
            return Outcome(broken)
        freed_s = self._freed_s(written_s)
        peak = self._peak(moved, freed_s, read_s)
        saved = [self.nbytes[index] * (read_s[index] - freed_s[index]) for index in moved]
        if not self._plain:
            saved += [
                (self._whole[index] - self.nbytes[index]) * (self._ends_s[index] - freed_s[index])
                for index in moved
            ]
        return Outcome(-1, peak, staging_peak, moved_bytes, -sum(saved), written_s, read_s)

    def _transfer(
        self,
        mine: Sequence[int],
        reads: Sequence[int],
        number: int,
        written_s: list[float],
        read_s: list[float],
    ) -> int:
        """Fill in the times of one channel; return a tensor whose write would end too late, or -1.

        Where writes and reads meet, both are priced at what goes through together.
        """
        broken = -1
        for mixed in (False, True):
            write_takes_s, read_takes_s = self.seconds(number, mixed)
            blocks = self._read_late(reads, read_takes_s, read_s)
            broken = self._write_early(mine, write_takes_s, blocks, written_s, read_s)
            meet = broken >= 0 or written_s[mine[-1]] > blocks[-1][0]
            if not meet or self.channels[number].mixed_bytes_per_s == math.inf:
                break
        return broken

    def _read_late(
        self, reads: Sequence[int], takes_s: Sequence[float], read_s: list[float]
    ) -> list[tuple[float, float]]:
        """Place the reads, the last one first; return when the channel is busy, latest first."""
        blocks: list[tuple[float, float]] = []
        begin = block_end = math.inf
        needed_s = self.needed_s
        for index in reversed(reads):
            end = needed_s[index]
            if end < begin:
                if begin < math.inf:
                    blocks.append((begin, block_end))
                block_end = end
            else:
                end = begin
            begin = read_s[index] = end - takes_s[index]
        blocks.append((begin, block_end))
        return blocks

    def _write_early(
        self,
        mine: Sequence[int],
        takes_s: Sequence[float],
        blocks: Sequence[tuple[float, float]],
        written_s: list[float],
        read_s: Sequence[float],
    ) -> int:
        """Place the writes between `blocks`; return the first that ends after its read began."""
        at = len(blocks) - 1  # of the next block
        now, saved_s = -math.inf, self.saved_s
        for index in mine:
            saved = saved_s[index]
            now = saved if saved > now else now
            left = takes_s[index]
            while at >= 0 and now + left > blocks[at][0]:
                begin, end = blocks[at]
                left -= max(0.0, begin - now)
                now = max(now, end)
                at -= 1
            now += left
            written_s[index] = now
            if now > read_s[index] + _SLACK_S:
                return index
        return -1

    def _over_capacity(self, mine: Sequence[int], channel: Channel) -> int:
        """Return the first tensor that the tier has no room for, or that may not be written."""
        if channel.written_bytes < math.inf:
            written = 0
            for index in mine:
                written += self.nbytes[index]
                if written > channel.written_bytes:
                    return index
        if channel.capacity_bytes == math.inf:
            return -1
        gains = [(self.saved_s[index], index) for index in mine]
        losses = [(self.released_s[index], self.nbytes[index]) for index in mine]
        return self._first_over(gains, losses, channel.capacity_bytes)[0]

    def _staging(
        self,
        moved: Sequence[int],
        written_s: Sequence[float],
        read_s: Sequence[float],
    ) -> tuple[int, int]:
        gains = [(self.saved_s[index], index) for index in moved]
        gains += [(read_s[index], index) for index in moved]
        losses = [(written_s[index], self.nbytes[index]) for index in moved]
        losses += [(self.released_s[index], self.nbytes[index]) for index in moved]
        return self._first_over(gains, losses, self.limits.staging_bytes)

    def window(
        self,
        moved: Sequence[int],
        written_s: Sequence[float],
        read_s: Sequence[float],
        limit: float = math.inf,
    ) -> tuple[int, int]:
        """Return the tensor whose copy has copies hold more than `limit` of the device, or -1.

        With the most that they hold until then, of what leaves or of what comes back.
        """
        most = 0
        for begin_s, end_s in ((self.saved_s, written_s), (read_s, self.needed_s)):
            gains = [(begin_s[index], index) for index in moved]
            losses = [(end_s[index], self.nbytes[index]) for index in moved]
            broken, peak = self._first_over(gains, losses, limit, alone=True)
            most = max(most, peak)
            if broken >= 0:
                return broken, most
        return -1, most

    def fits_window(self, choice: Sequence[int], outcome: Outcome) -> bool:
        """Say whether the copies of a choice, made without regard to it, hold to the window."""
        moved = [index for index, option in enumerate(self.tied(choice)) if option != KEPT]
        limit = self.limits.window_bytes
        return self.window(moved, outcome.written_s, outcome.read_s, limit)[0] < 0

    def _first_over(
        self,
        gains: list[tuple[float, int]],
        losses: list[tuple[float, int]],
        limit: float,
        *,
        alone: bool = False,
    ) -> tuple[int, int]:
        """Return the tensor whose gain exceeds `limit` first (or -1), and the peak until then.

        `alone`: one that nothing else is there with may be larger.
        """
        gains.sort()
        losses.sort()
        losses.append((math.inf, 0))
        now = peak = at = 0
        end_s, freed = losses[0]
        for time_s, index in gains:
            while end_s < time_s:
                now -= freed
                at += 1
                end_s, freed = losses[at]
            now += self.nbytes[index]
            if now > peak:
                peak = now
            if now > limit and not (alone and now == self.nbytes[index]):
                return index, peak
        return -1, peak

    def _peak(
        self,
        moved: Sequence[int],
        freed_s: Sequence[float],
        read_s: Sequence[float],
    ) -> int:
        nbytes, whole = self.nbytes, self._whole
        gains = self._saves + [(read_s[index], nbytes[index]) for index in moved]
        if self._plain:
            losses = self._releases + [(freed_s[index], nbytes[index]) for index in moved]
            return peak_of(gains, losses)
        ends = list(zip(self._ends_s, whole, strict=True))
        for index in moved:
            ends[index] = self.released_s[index], nbytes[index]
        return peak_of(gains, ends + [(freed_s[index], whole[index]) for index in moved])
