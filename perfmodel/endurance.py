"""How much may be written to an SSD in a day, and how long it lasts under what is written."""

from __future__ import annotations

import math

__all__ = ["DAY_S", "WriteBudget", "life_days", "needed_per_day"]

DAY_S = 86_400.0
# This part of a day's bytes may be written at once; the rest comes evenly over the day.
_AT_ONCE = 1 / 24


class WriteBudget:
    """Lets at most `bytes_per_day` through in any 24 hours. It is told the time, in seconds.

    Raises ValueError unless `bytes_per_day` is positive.
    """

    def __init__(self, bytes_per_day: float, now_s: float) -> None:
        if not 0 < bytes_per_day < math.inf:
            raise ValueError(f"bytes_per_day={bytes_per_day!r} is not a positive number of bytes")
        self._most = bytes_per_day * _AT_ONCE
        self.bytes_per_s = bytes_per_day * (1 - _AT_ONCE) / DAY_S
        """What may be written without end."""
        self._left = self._most
        self._seen_s = now_s

    def allow(self, nbytes: int, now_s: float) -> bool:
        """Say whether `nbytes` may be written now; if so, they are taken to be."""
        passed_s = max(0.0, now_s - self._seen_s)
        self._left = min(self._most, self._left + passed_s * self.bytes_per_s)
        self._seen_s = max(self._seen_s, now_s)
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """Take back what was allowed and then not written."""
        self._left = min(self._most, self._left + nbytes)


def needed_per_day(bytes_per_s: float) -> float:
    """Return the `bytes_per_day` of a `WriteBudget` that lets so many through without end."""
    return bytes_per_s * DAY_S / (1 - _AT_ONCE)


def life_days(
    bytes_per_day: float,
    rated_bytes: float,
    *,
    write_amplification: float = 1.0,
    rated_amplification: float = 1.0,
) -> float:
    """Return the days until the drive's rated endurance is used up; infinite if nothing is written.

    `rated_bytes` is what its maker says that hosts may write (TBW), under a workload that the drive
    amplifies `rated_amplification` times; ours it amplifies `write_amplification` times. Large
    sequential writes are close to 1, and JEDEC's workload for client drives is said to be about
    2.5 (SSDTrain, section 3.4): the defaults take no credit for that, nor for shorter retention.
    """
    for name, value in (
        ("rated_bytes", rated_bytes),
        ("write_amplification", write_amplification),
        ("rated_amplification", rated_amplification),
    ):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} is not a positive number")
    if bytes_per_day < 0:
        raise ValueError(f"bytes_per_day={bytes_per_day!r} is negative")
    worn = bytes_per_day * write_amplification
    return rated_bytes * rated_amplification / worn if worn else math.inf
