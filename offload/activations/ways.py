"""What the ways to each tier do together: all bytes cross the link, where there is one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from offload.activations.rates import Throughput

__all__ = ["LINK", "ways_to_tiers"]

LINK = "link"
"""The name of the way to a device, among those of tiers."""

# Of a link's rate, what is left for a second tier.
_WORTH_HAVING = 0.02


def ways_to_tiers(known: Mapping[str, Throughput], tiers: Collection[str]) -> dict[str, Throughput]:
    """Return what goes to each of `tiers` and back, from what the SSD and the link are known to do.

    Of one link no more than it has goes to all of them. To the host tier nothing goes without one,
    or where the SSD takes all that it has.
    """
    link = known.get(LINK)
    ways: dict[str, Throughput] = {}
    if "ssd" in tiers:
        ssd = known["ssd"]
        write, read = (min(rates) for rates in zip(ssd[:2], (link or ssd)[:2], strict=True))
        ways["ssd"] = Throughput(write, read, ssd.mixed_bytes_per_s)
    if "host" in tiers and link is not None:
        # What comes from the SSD went there first: it takes of neither direction more than the
        # slower one has for it.
        taken = min(ways["ssd"][:2]) if "ssd" in ways else 0.0
        write, read = (rate - taken for rate in link[:2])
        if min(write, read) > _WORTH_HAVING * min(link[:2]):
            ways["host"] = Throughput(write, read, math.inf)
            if "ssd" in ways:
                ways["ssd"] = Throughput(taken, taken, ways["ssd"].mixed_bytes_per_s)
    return ways
