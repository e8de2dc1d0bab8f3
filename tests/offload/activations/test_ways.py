"""Tests of `offload.activations.ways`: one link is not sold twice, and none of it is wasted."""

from __future__ import annotations

import pytest

from offload.activations.rates import Throughput
from offload.activations.ways import LINK, ways_to_tiers

BOTH = ("ssd", "host")


def known(
    ssd: tuple[float, float], link: tuple[float, float] = (2.0, 2.0)
) -> dict[str, Throughput]:
    return {"ssd": Throughput(*ssd, max(ssd)), LINK: Throughput(*link, max(link))}


def require_within(ways: dict[str, Throughput], link: tuple[float, float] = (2.0, 2.0)) -> None:
    for rates, most in zip(zip(*ways.values(), strict=True), link, strict=False):
        assert sum(rates) <= most


@pytest.mark.parametrize(("ssd", "tiers"), [(0.5, BOTH), (2.0, ("ssd",)), (8.0, ("ssd",))])
def test_one_link_is_not_sold_twice(ssd: float, tiers: tuple[str, ...]) -> None:
    ways = ways_to_tiers(known((ssd, ssd)), BOTH)
    require_within(ways)
    assert tuple(ways) == tiers


@pytest.mark.parametrize("ssd", [(0.2, 8.0), (8.0, 0.2)])
def test_an_ssd_that_is_slow_in_one_direction_leaves_the_link_to_the_host(
    ssd: tuple[float, float],
) -> None:
    ways = ways_to_tiers(known(ssd), BOTH)
    require_within(ways)
    assert ways["ssd"][:2] == (0.2, 0.2), "more cannot go there and come back"
    assert ways["host"][:2] == (1.8, 1.8)


def test_an_ssd_alone_keeps_both_its_rates_up_to_the_links() -> None:
    assert ways_to_tiers(known((0.2, 8.0)), ("ssd",))["ssd"] == Throughput(0.2, 2.0, 8.0)
    without = ways_to_tiers({"ssd": Throughput(0.2, 8.0, 8.0)}, BOTH)
    assert without == {"ssd": Throughput(0.2, 8.0, 8.0)}, "the host is where they are"


def test_the_host_alone_has_the_whole_link() -> None:
    ways = ways_to_tiers({LINK: Throughput(1.0, 3.0)}, ("host",))
    assert ways["host"][:2] == (1.0, 3.0)
