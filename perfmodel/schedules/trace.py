"""What one step saved and when it was wanted again, and the channels it could have used meanwhile.

Times are seconds from the start of the step as it would run without any stall; sizes are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

__all__ = ["Channel", "Limits", "SavedTensor", "Trace"]


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One run of bytes that autograd saved; views that share them are one.

    Raises ValueError unless 0 <= `saved_s` <= `needed_s` <= `released_s` and `nbytes` > 0.
    """

    nbytes: int
    saved_s: float
    """When the forward has made it, so that it may leave."""
    needed_s: float
    """When the backward asks for it first."""
    released_s: float
    """When the backward is done with it."""
    held: bool = False
    """Somebody else keeps its memory meanwhile: moving it would save nothing."""
    storage: int = -1
    """What it shares its memory with, which is free once all of them have left: those of the same
    number. -1: nothing."""
    rest_bytes: int = 0
    """What else its storage has, which nobody saved: in memory for as long as the storage is, and
    not brought back. Of those that share a storage, one has it."""

    def __post_init__(self) -> None:
        """Check the order of times."""
        if (
            self.nbytes <= 0
            or self.rest_bytes < 0
            or not 0 <= self.saved_s <= self.needed_s <= self.released_s < math.inf
        ):
            raise ValueError(
                f"{self} is impossible: nbytes > 0 and 0 <= saved <= needed <= released"
            )


@dataclass(frozen=True)
class Trace:
    """The saved tensors of one step, in the order in which they were saved.

    Raises ValueError when they are not in that order.
    """

    tensors: tuple[SavedTensor, ...]

    def __post_init__(self) -> None:
        """Check the order."""
        object.__setattr__(self, "tensors", tuple(self.tensors))
        times = [tensor.saved_s for tensor in self.tensors]
        if times != sorted(times):
            raise ValueError("the tensors of a trace must be in the order in which they were saved")

    def shared(self) -> list[list[int]]:
        """Return the tensors that share their memory with others, by storage."""
        storages: dict[int, list[int]] = {}
        for index, tensor in enumerate(self.tensors):
            if tensor.storage >= 0:
                storages.setdefault(tensor.storage, []).append(index)
        return [members for members in storages.values() if len(members) > 1]

    def ends_s(self) -> list[float]:
        """Return until when each is in memory when nothing leaves: until all of its storage is."""
        ends_s = [tensor.released_s for tensor in self.tensors]
        for members in self.shared():
            last_s = max(ends_s[index] for index in members)
            for index in members:
                ends_s[index] = last_s
        return ends_s

    @property
    def kept_peak_bytes(self) -> int:
        """The peak when nothing leaves."""
        sizes = [tensor.nbytes + tensor.rest_bytes for tensor in self.tensors]
        saved_s = (tensor.saved_s for tensor in self.tensors)
        return peak_of(zip(saved_s, sizes, strict=True), zip(self.ends_s(), sizes, strict=True))


def peak_of(gains: Iterable[tuple[float, int]], losses: Iterable[tuple[float, int]]) -> int:
    """Return the largest sum of `gains` (time, bytes) less the `losses` before them.

    What ends at the moment in which something else begins still counts.
    """
    ends = sorted(losses)
    ends.append((math.inf, 0))
    now = peak = at = 0
    end_s, freed = ends[0]
    for time_s, nbytes in sorted(gains):
        while end_s < time_s:
            now -= freed
            at += 1
            end_s, freed = ends[at]
        now += nbytes
        if now > peak:
            peak = now
    return peak


@dataclass(frozen=True, kw_only=True)
class Channel:
    """The way to a tier and back. One transfer at a time, reads before writes, else in order.

    Raises ValueError for a rate that is not positive or a bound that is negative.
    """

    tier: str
    write_bytes_per_s: float
    read_bytes_per_s: float
    mixed_bytes_per_s: float = math.inf
    """The most that goes through, both directions together, while both are in use."""
    latency_s: float = 0.0
    """Of each transfer."""
    capacity_bytes: float = math.inf
    """What the tier holds at any moment."""
    written_bytes: float = math.inf
    """What a step may write: the drive's endurance."""
    staged: bool = True
    """What goes this way takes room in staging."""

    def __post_init__(self) -> None:
        """Check rates and bounds."""
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in ("tier", "staged"):
                continue
            wrong = value <= 0 if one.name.endswith("per_s") else value < 0
            if math.isnan(value) or wrong:
                raise ValueError(
                    f"{one.name}={value!r} of the channel to {self.tier!r} is too small"
                )

    def write_s(self, nbytes: int, mixed: bool = False) -> float:
        """Return how long writing takes; `mixed`: while reads are under way as well."""
        rate = self.write_bytes_per_s
        return self.latency_s + nbytes / (min(rate, self.mixed_bytes_per_s) if mixed else rate)

    def read_s(self, nbytes: int, mixed: bool = False) -> float:
        """Return how long reading takes; `mixed`: while writes are under way as well."""
        rate = self.read_bytes_per_s
        return self.latency_s + nbytes / (min(rate, self.mixed_bytes_per_s) if mixed else rate)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What must hold at every instant of a step."""

    staging_bytes: float = math.inf
    """Bytes on their way out, on their way in, or in and not yet released; of all channels that
    are staged."""
    window_bytes: float = math.inf
    """Bytes of the device on their way out, and of those on their way in or early; of all channels.
    A single tensor may be larger."""
    min_tensor_bytes: int = 0
    """Smaller tensors stay."""
