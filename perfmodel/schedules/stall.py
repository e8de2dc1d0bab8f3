"""How long a step really waits that follows a schedule: as long as it must, where it must."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from perfmodel.schedules.activations import ActivationSchedule
from perfmodel.schedules.trace import Channel, Limits, Trace

__all__ = ["stall_s"]

_BEGIN, _SAVE, _NEED, _RELEASE = range(4)


def stall_s(
    schedule: ActivationSchedule,
    trace: Trace,
    channels: Iterable[Channel],
    limits: Limits | None = None,
    memory_bytes: float = math.inf,
) -> float:
    """Return for how long a step waits for its transfers.

    The forward waits where a tensor that it saves would not fit into `memory_bytes`, or one that
    leaves not into staging, until enough has been written; the backward for what it needs and has
    not been read. Each direction of a channel does one transfer after the other, in order. Never
    more than `schedule.slowdown` times the step, on the channels that the schedule was made for.
    """
    step = _Step(schedule, trace, channels, limits or Limits(), memory_bytes)
    return step.run()


class _Step:
    def __init__(
        self,
        schedule: ActivationSchedule,
        trace: Trace,
        channels: Iterable[Channel],
        limits: Limits,
        memory_bytes: float,
    ) -> None:
        self._schedule, self._tensors = schedule, trace.tensors
        by_tier = {channel.tier: channel for channel in channels}
        self._channels: list[Channel | None] = [by_tier.get(tier) for tier in schedule.tiers]
        self._ends_s = trace.ends_s()
        self._staging_bytes, self._memory_bytes = limits.staging_bytes, memory_bytes
        self._delay_s = 0.0
        self._in_use = self._staged = 0
        self._writes: list[tuple[float, int]] = []  # under way: their ends, and of which tensor
        self._written_s = [0.0] * len(self._tensors)
        self._read_s = [0.0] * len(self._tensors)  # when they have been read
        self._free_s: dict[tuple[str, bool], float] = {}  # of each direction
        # Of those that share a storage, which is free once all have been written.
        self._unwritten = {index: members for members in trace.shared() for index in members}
        self._left = {id(members): len(members) for members in self._unwritten.values()}

    def run(self) -> float:
        """Take the step, event by event; return by how much it was delayed."""
        place = {index: at for at, index in enumerate(self._schedule.order)}
        for time_s, kind, index in sorted(self._events()):
            now_s = time_s + self._delay_s
            self._advance(now_s)
            if kind == _SAVE:
                self._save(index, now_s)
            elif kind == _BEGIN:
                self._read([index], now_s)
            elif kind == _NEED:
                self._read(self._schedule.reads_before[place[index]], now_s)
                if self._channels[index] is not None:
                    self._delay_s += max(0.0, self._read_s[index] - now_s)
            else:
                self._release(index)
        return self._delay_s

    def _events(self) -> Iterable[tuple[float, int, int]]:
        for index in self._schedule.reads_first:
            yield self._schedule.read_s[index], _BEGIN, index
        for index, tensor in enumerate(self._tensors):
            leaves = self._channels[index] is not None
            yield tensor.saved_s, _SAVE, index
            yield tensor.needed_s, _NEED, index
            yield (tensor.released_s if leaves else self._ends_s[index]), _RELEASE, index

    def _whole(self, index: int) -> int:
        tensor = self._tensors[index]
        return tensor.nbytes + tensor.rest_bytes

    def _advance(self, now_s: float) -> None:
        """Let go of what has been written by now."""
        while self._writes and self._writes[0][0] <= now_s:
            _, index = heappop(self._writes)
            self._take_staging(index, -1)
            members = self._unwritten.get(index, [index])
            if len(members) > 1:
                self._left[id(members)] -= 1
                if self._left[id(members)]:
                    continue
            self._in_use -= sum(map(self._whole, members))

    def _take_staging(self, index: int, sign: int) -> None:
        channel = self._channels[index]
        if channel is not None and channel.staged:
            self._staged += sign * self._tensors[index].nbytes

    def _save(self, index: int, now_s: float) -> None:
        channel, nbytes = self._channels[index], self._tensors[index].nbytes
        staged = nbytes if channel is not None and channel.staged else 0
        while self._writes and (
            self._in_use + self._whole(index) > self._memory_bytes
            or (staged and self._staged + staged > self._staging_bytes)
        ):
            self._delay_s += self._writes[0][0] - now_s
            now_s = self._writes[0][0]
            self._advance(now_s)
        self._in_use += self._whole(index)
        if channel is not None:
            self._take_staging(index, +1)
            way = channel.tier, True
            end_s = max(self._free_s.get(way, 0.0), now_s) + channel.write_s(nbytes)
            self._free_s[way] = self._written_s[index] = end_s
            heappush(self._writes, (end_s, index))

    def _read(self, indices: Sequence[int], now_s: float) -> None:
        for index in indices:
            channel, nbytes = self._channels[index], self._tensors[index].nbytes
            assert channel is not None
            way = channel.tier, False
            begin_s = max(self._free_s.get(way, 0.0), self._written_s[index], now_s)
            self._free_s[way] = self._read_s[index] = begin_s + channel.read_s(nbytes)
            self._in_use += nbytes
            self._take_staging(index, +1)

    def _release(self, index: int) -> None:
        if self._channels[index] is None:
            self._in_use -= self._whole(index)
        else:
            self._in_use -= self._tensors[index].nbytes
            self._take_staging(index, -1)
