"""What comes back next: nothing is passed over for good that has not been used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import offload
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
