"""What a way out and back has been seen to do, bytes a second."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["CHANGED", "LEAST_BYTES", "Rates", "Throughput"]

# A way this much faster or slower than it was planned with is planned with again.
CHANGED = 0.2
# Shorter measurements say nothing.
LEAST_BYTES, _LEAST_BUSY_S = 8 << 20, 2e-3
# After so many measurements without both at once, that is taken to have become faster.
_UNMIXED = 8
# However little came through, after so long it is all that there is.
_LONG_BUSY_S = 0.05


class Throughput(NamedTuple):
    """Bytes a second, while there was anything to do; nan where nothing was seen yet."""

    write_bytes_per_s: float
    read_bytes_per_s: float
    mixed_bytes_per_s: float = math.nan
    """Of both directions together, while both were under way."""

    def known(self) -> Throughput | None:
        """Return this without a nan; None until anything was written.

        Until anything was read, that is as fast as writing. Both at once are no faster than the
        faster one, and as fast as it until they were seen together: transfers take turns in plans.
        """
        write, read, mixed = self
        if math.isnan(write):
            return None
        read = write if math.isnan(read) else read
        most = max(write, read)
        return Throughput(write, read, most if math.isnan(mixed) else min(mixed, most))

    def differs(self, planned: Throughput, least: float = CHANGED) -> bool:
        """Say whether this is faster or slower than what was planned with by a part of `least`."""
        known = self.known()
        return known is not None and any(
            not 1 / (1 + least) <= now / then <= 1 + least
            for now, then, seen in zip(known, planned, self, strict=True)
            if not math.isnan(seen)
        )


UNKNOWN = Throughput(math.nan, math.nan)


class Rates:
    """Follows running totals of bytes and busy seconds; the latest weigh as much as all before."""

    def __init__(self, throughput: Throughput = UNKNOWN) -> None:
        self.throughput = throughput
        self._seen = [(0.0, 0.0)] * len(throughput)
        self._unmixed = 0

    def observe(self, *totals: tuple[float, float]) -> bool:
        """Take in the totals of writing, of reading, and of both at once where that is known.

        Says whether writing or reading say anything new.
        """
        rates, news = list(self.throughput), False
        for way, total in enumerate(totals):
            nbytes, busy_s = (now - seen for now, seen in zip(total, self._seen[way], strict=True))
            if busy_s < _LEAST_BUSY_S or (nbytes < LEAST_BYTES and busy_s < _LONG_BUSY_S):
                continue
            rate, known = max(nbytes, 1.0) / busy_s, rates[way]
            rates[way] = rate if math.isnan(known) else (rate + known) / 2
            self._seen[way] = total
            news |= way < 2
            self._unmixed = 0 if way == 2 else self._unmixed
        # Plans that avoid both at once never see that they have become faster.
        self._unmixed += news
        if self._unmixed > _UNMIXED:
            rates[2] = min(rates[2] * (1 + CHANGED), max(rates[:2]))
            self._unmixed = 0
        self.throughput = Throughput(*rates)
        return news
