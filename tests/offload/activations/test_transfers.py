"""Tests of `offload.activations.transfers`: what is known of the ways that bytes take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from offload.device import EmulatedLink


def test_the_links_of_all_devices_are_measured_as_the_average_one(make: Any) -> None:
    act = make(emulated_device=EmulatedLink())
    (crossing,) = act.transfers.crossings.values()
    crossing.link.transferred = lambda: ((10.0, 1.0), (40.0, 2.0))
    other = SimpleNamespace(link=SimpleNamespace(transferred=lambda: ((30.0, 3.0), (0.0, 0.0))))
    act.transfers.crossings[torch.device("meta")] = other
    try:
        assert act.transfers.totals(crossing)["link"] == ((40.0, 4.0), (40.0, 2.0))
    finally:
        del act.transfers.crossings[torch.device("meta")]
