"""Tests of `offload.activations.transfers`: what is known of the ways that bytes take."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
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


class Slow:
    """An extent whose bytes take until they are fetched, and what is asked of it."""

    def __init__(self, region: Any, log: list[tuple[str, int, bool]]) -> None:
        self._extent, self._region, self._log = region.extent, region, log
        self.nbytes = region.nbytes
        self.ready = False

    def prefetch(self) -> bool:
        backward = self._region.forward.backward
        position = self._region.position
        self._log.append(("read", position, position <= backward.due))
        return True

    def fetch(self) -> Any:
        self._log.append(("fetch", self._region.position, True))
        return self._extent.fetch()


def backward_of_slow_reads(act: Any, room: int, monkeypatch: Any) -> list[tuple[str, int, bool]]:
    """Return what a planned backward asks for, in which every second tensor has the next one due.

    `room`: how many bytes may be read before their time.
    """
    log: list[tuple[str, int, bool]] = []
    start = torch.randn(1 << 15, requires_grad=True)
    for number in range(5):
        act.book.rates["ssd"] = Rates(Throughput(1e12, 1e12))  # so that all leaves
        with act.forward() as forward:
            x = start * 1.0
            for _ in range(10):
                x = torch.exp(-x)
            loss = x.sum()
        del x
        act.transfers.drain()
        if number == 4:
            order = forward.backward
            due = tuple(at + (at + 1) % 2 for at in range(len(order.order)))
            schedule = replace(order.plan.schedule, staging_peak_bytes=room)
            order.plan = replace(order.plan, due=due, schedule=schedule)
            monkeypatch.setattr(act.transfers, "ahead_bytes", 0)
            order.read_at, order.due = 0, -1
            for region in forward.regions:
                region.ahead = False
                if region.is_away():
                    region.extent = Slow(region, log)

            def note(region: Any, *args: Any, want: Any = order.want) -> None:
                log.append(("want", region.position, True))
                want(region, *args)

            order.want = note
        loss.backward()
    return log


def test_what_a_plan_has_due_is_read_before_anything_early(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = backward_of_slow_reads(make(schedule="auto"), 4 << 20, monkeypatch)
    reads = [(first, then) for first, then in pairwise(log) if first[0] == then[0] == "read"]
    assert not [pair for pair in reads if pair[0][2] and not pair[1][2]]
    begun = [due for what, _, due in log if what == "read"]
    assert True in begun
    assert False in begun


def test_nothing_is_read_beside_what_a_planned_backward_waits_for(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = backward_of_slow_reads(make(schedule="auto"), 0, monkeypatch)
    fetched = [at for at, (what, _, _) in enumerate(log) if what == "fetch"]
    assert len(fetched) > 5
    for at in fetched:
        _, position, _ = log[at - 1]
        # The wanted one itself, where it had not begun.
        assert position == log[at][1], log[at - 3 : at + 1]
