"""What a way out and back has been seen to do, bytes a second."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["CHANGED", "LEAST_BYTES", "Rates", "Throughput"]

# A way this much faster or slower than it was planned with is planned with again.
CHANGED = 0.2
# Shorter measurements say nothing.
LEAST_BYTES, _LEAST_BUSY_S = 8 << 20, 2e-3
# However little came through, after so long it is all that there is.
_LONG_BUSY_S = 0.05


class Throughput(NamedTuple):
    """Bytes a second, while there was anything to do; nan where nothing was seen yet."""

    write_bytes_per_s: float
    read_bytes_per_s: float

    def known(self) -> Throughput | None:
        """Return this with a read rate: until anything was read, as fast as writing."""
        write, read = self
        if math.isnan(write):
            return None
        return Throughput(write, write if math.isnan(read) else read)

    def differs(self, planned: Throughput, least: float = CHANGED) -> bool:
        """Say whether this is faster or slower than what was planned with by a part of `least`."""
        return any(
            not 1 / (1 + least) <= now / then <= 1 + least
            for now, then in zip(self, planned, strict=True)
            if not math.isnan(now)
        )


UNKNOWN = Throughput(math.nan, math.nan)


class Rates:
    """Follows running totals of bytes and busy seconds; the latest weigh as much as all before."""

    def __init__(self, throughput: Throughput = UNKNOWN) -> None:
        self.throughput = throughput
        self._seen = [0.0] * 4

    def observe(self, write: tuple[float, float], read: tuple[float, float]) -> bool:
        """Take in the totals of both directions; say whether they say anything new."""
        seen = (*write, *read)
        rates, anything = [], False
        for at, known in ((0, self.throughput[0]), (2, self.throughput[1])):
            nbytes, busy_s = seen[at] - self._seen[at], seen[at + 1] - self._seen[at + 1]
            if busy_s < _LEAST_BUSY_S or (nbytes < LEAST_BYTES and busy_s < _LONG_BUSY_S):
                rates.append(known)
                continue
            rate = max(nbytes, 1.0) / busy_s
            rates.append(rate if math.isnan(known) else (rate + known) / 2)
            self._seen[at : at + 2] = seen[at : at + 2]
            anything = True
        self.throughput = Throughput(*rates)
        return anything
