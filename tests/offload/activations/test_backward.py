"""What comes back next: nothing is passed over for good that has not been used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import offload
from offload.activations.backward import BackwardOrder
from offload.activations.crossing import Crossing
from offload.device import EmulatedLink

Open = Callable[..., offload.ActivationOffload]
MIB = 1 << 20
NBYTES = 1 << 18
TIERS: dict[str, dict[str, Any]] = {
    "ssd": {"tier": "ssd"},
    "host": {"tier": "host", "path": (), "host_bytes": 64 * MIB},
    "gds": {"tier": "ssd", "gds": True},
}


class Fake:
    """A region that is in memory at first, and is asked again and again whether it still is."""

    asked = 0

    def __init__(self, number: int) -> None:
        self.number, self.position, self.nbytes, self.last_save = number, -1, 1, number
        self.used = self.ahead = self.away = False
        self.arrival: object = None
        self.crossing = object()

    def is_away(self) -> bool:
        Fake.asked += 1
        return self.away

    def may_be_read(self) -> bool:
        return not self.ahead and self.arrival is None and self.is_away()


def expected(count: int) -> tuple[BackwardOrder, list[Any]]:
    regions: list[Any] = [Fake(number) for number in range(count)]
    order = BackwardOrder(regions)
    order.expect(None, None, alone=True)
    return order, sorted(regions, key=lambda region: region.position)


def test_what_has_landed_is_not_read_again_when_others_leave_late() -> None:
    order, regions = expected(6)
    for region in regions[2:]:
        region.away = True
    for region in regions[2:]:
        assert order.next_to_read() is region
        region.ahead = True
        assert order.next_to_bring() is region
        region.arrival, region.ahead = object(), False
    assert order.next_to_read() is order.next_to_bring() is None
    regions[1].away = True
    order.come_back_to(regions[1])
    assert order.next_to_read() is order.next_to_bring() is regions[1]
    regions[1].arrival = object()
    regions[0].used = True
    order.come_back_to(regions[0])
    assert order.next_to_read() is order.next_to_bring() is None


def test_regions_that_leave_one_by_one_are_looked_at_a_few_times_each() -> None:
    count = 2000
    order, regions = expected(count)
    assert order.next_to_read() is order.next_to_bring() is None
    Fake.asked = 0
    for region in reversed(regions):
        region.away = True
        order.come_back_to(region)
        assert order.next_to_read() is region
        region.ahead = True
        assert order.next_to_bring() is region
        region.arrival = object()
    assert order.next_to_read() is order.next_to_bring() is None
    assert Fake.asked <= 8 * count


@pytest.mark.parametrize("tier", TIERS)
def test_what_has_only_just_left_comes_back_before_what_is_wanted_later(
    make: Open, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, held, late = 5 * NBYTES, [], False
    make_room, let_go = Crossing._make_room, Crossing._let_go
    link = EmulatedLink(latency_s=0.004)
    settings = {"memory_bytes": limit, "staging_bytes": 16 * MIB, "emulated_device": link}
    act = make(**TIERS[tier], schedule="auto", **settings)

    def note(self: Crossing, region: Any) -> Any:
        arrival = make_room(self, region)
        copies = self._departing_bytes + self._arriving_bytes
        held.append(copies + act.counters.staying_now)
        return arrival

    monkeypatch.setattr(Crossing, "_make_room", note)
    # As if all copies were made just after the backward has looked at what is to come back.
    monkeypatch.setattr(Crossing, "_let_go", lambda self: None if late else let_go(self))
    weight = torch.eye(128).requires_grad_()
    for _ in range(6):
        late = True
        with act.forward():
            x = torch.ones(512, 128)
            for _ in range(12):
                x = torch.tanh(x @ weight)
            loss = x.mean()
        late = False
        loss.backward()
    assert act.book.planned > 0
    assert NBYTES < max(held) <= limit
