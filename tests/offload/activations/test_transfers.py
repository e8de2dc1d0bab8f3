"""Tests of `offload.activations.transfers`: what is known of the ways that bytes take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from offload.activations.rates import Rates, Throughput
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


def test_a_forward_that_lingers_takes_no_part_of_the_next_ones_limit(make: Any) -> None:
    limit, nbytes = 1 << 20, 1 << 18
    act = make(schedule="auto", memory_bytes=limit)
    start = torch.randn(nbytes // 4, requires_grad=True)
    kept, limits = None, []
    act._stores.ssd.set_limit = limits.append
    for _ in range(4):
        with act.forward():
            x = start * 1.0
            for _ in range(12):
                x = torch.exp(-x)
            aux = torch.exp(start[:64] * 1.0)  # with a graph whose backward nobody runs
        assert len(act.forwards) <= 2
        kept = aux
        x.sum().backward()
        del x, aux
    assert kept is not None
    assert limit <= max(limits) <= limit + 512
    (forward,) = act.forwards
    assert 0 < forward.left_bytes <= 512
    assert act.depth_of(act.forward()) == 1


def test_what_was_handed_back_without_reading_counts_once_whoever_saved_it(make: Any) -> None:
    act = make()
    x = torch.randn(1 << 12, requires_grad=True)
    with act.forward():
        held = x * 2
        loss = sum((held * held.sin()).sum() for _ in range(5))
    act.transfers.drain()
    loss.backward()
    stats = act.stats()
    assert stats.forwarded_bytes >= held.nbytes
    assert stats.forwarded_bytes + stats.reloaded_bytes <= stats.offloaded_bytes


def test_what_stays_counts_with_the_rest_of_its_storage(make: Any) -> None:
    act = make(schedule="auto", memory_bytes=1 << 30)
    act.book.rates["ssd"] = Rates(Throughput(1e12, 1e12))
    inp = torch.randn(1 << 14, requires_grad=True)
    staying = []
    for _ in range(6):
        with act.forward():
            parts = []
            for factor in range(4):
                big = inp * (factor + 1)  # saves nothing large
                parts.append(big[: 1 << 10].sin().sum())
                del big
            loss = sum(parts)
        staying.append(act.counters.staying_now)
        loss.backward()
        assert act.counters.staying_now == 0
    assert staying[-1] == 4 * inp.nbytes
    assert act.stats().predicted_peak_bytes >= 4 * inp.nbytes
