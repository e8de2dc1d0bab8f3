"""Regions of a device, emulated: copies beside the computation, in any order, the same bits."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import offload
from offload.activations.crossing import Crossing
from offload.activations.identity import release_weak_storage, storage_alive, weak_storage
from offload.activations.rates import Rates, Throughput
from offload.device import EmulatedLink, Moment
from offload.device.emulated import _Copy
from offload.native import Buffer, FaultPlan, FaultRule

KIB, MIB = 1 << 10, 1 << 20
WIDTH = 128
NBYTES = 4 * WIDTH * 512  # of an activation of 512 rows
Open = Callable[..., offload.ActivationOffload]
TIERS: dict[str, dict[str, Any]] = {
    "ssd": {"tier": "ssd"},
    "host": {"tier": "host", "path": (), "host_bytes": 64 * MIB},
    "gds": {"tier": "ssd", "gds": True},
    "both": {"tier": "ssd", "host_bytes": 3 * NBYTES + 64 * KIB},
}


@pytest.fixture(params=list(TIERS))
def tier(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Where the bytes go: the SSD by way of host memory or not, host memory, or some to each."""
    return TIERS[request.param]


def weights_of(layers: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(WIDTH, WIDTH, generator=generator) / 11).requires_grad_()
        for _ in range(layers)
    ]


def loss_of(weights: list[torch.Tensor], number: int, rows: int = 512) -> torch.Tensor:
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(number))
    for weight in weights:
        x = torch.tanh(x @ weight).mul(1.01)
    return x.square().mean()


def train(act: offload.ActivationOffload | None, steps: int, layers: int = 6) -> list[Any]:
    weights = weights_of(layers)
    seen: list[Any] = []
    for number in range(steps):
        with contextlib.nullcontext() if act is None else act.forward():
            loss = loss_of(weights, number)
        loss.backward()
        seen.append(loss.item().hex())
    return [*seen, *[weight.grad for weight in weights]]


def equal(found: list[Any], expected: list[Any]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(
        torch.equal(*both) if torch.is_tensor(both[0]) else both[0] == both[1] for both in pairs
    )


def nothing_left(act: offload.ActivationOffload) -> None:
    gc.collect()
    act.stats()  # settles what was dropped
    act.transfers.drain()
    (crossing,) = act.transfers.crossings.values()
    crossing.finish()
    crossing.go_on()
    while crossing._landing:
        crossing._landing.popleft()[0].synchronize()
    assert crossing._arriving_bytes == 0
    assert act.transfers.ahead_bytes == 0
    for store in act._stores.named().values():
        assert store.arena.free_bytes == store.arena.nbytes
    assert act.stats().spill_bytes == 0


@pytest.mark.parametrize("schedule", ["all", "auto"])
@pytest.mark.parametrize("latency_s", [0.0, 0.002])
def test_training_has_the_same_bits(
    make: Open, tier: dict[str, Any], schedule: str, latency_s: float
) -> None:
    link = EmulatedLink(latency_s=latency_s)
    act = make(**tier, schedule=schedule, staging_bytes=2 * MIB, emulated_device=link)
    assert equal(train(act, 5), train(None, 5))
    assert act.stats().offloaded_bytes > 10 * NBYTES
    nothing_left(act)


@pytest.mark.parametrize("window", [0, NBYTES, 4 * NBYTES])
def test_the_window_bounds_what_copies_hold(make: Open, tier: dict[str, Any], window: int) -> None:
    link = EmulatedLink(latency_s=0.004)
    act = make(**tier, staging_bytes=8 * MIB, device_window_bytes=window, emulated_device=link)
    assert equal(train(act, 2), train(None, 2))
    (crossing,) = act.transfers.crossings.values()
    assert NBYTES <= crossing.departing_peak_bytes <= max(window, NBYTES)
    # With the one that is wanted.
    assert 0 < crossing.arriving_peak_bytes <= max(window, NBYTES) + NBYTES
    nothing_left(act)


def test_memory_bytes_bound_what_stays_and_what_is_still_leaving(
    make: Open, tier: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, held = 5 * NBYTES, []
    link, send, make_room = EmulatedLink(latency_s=0.004), Crossing.send, Crossing._make_room
    act = make(
        **tier, schedule="auto", memory_bytes=limit, staging_bytes=16 * MIB, emulated_device=link
    )

    def note(self: Crossing, result: Any) -> Any:
        copies = self._departing_bytes + self._arriving_bytes
        held.append(copies + act.counters.staying_now)
        return result

    monkeypatch.setattr(Crossing, "send", lambda self, *args: note(self, send(self, *args)))
    monkeypatch.setattr(Crossing, "_make_room", lambda self, one: note(self, make_room(self, one)))
    assert equal(train(act, 6), train(None, 6))
    assert act.book.planned > 0
    assert NBYTES < max(held) <= limit
    nothing_left(act)


def test_tensors_really_leave_and_are_brought_back_ahead(make: Open) -> None:
    act = make(**TIERS["host"], device_window_bytes=NBYTES, emulated_device=EmulatedLink())
    weights, weak = weights_of(8), []
    with act.forward():
        x = torch.ones(512, WIDTH)
        for weight in weights:
            x = torch.tanh(x @ weight)
            weak.append(weak_storage(x.untyped_storage()))
        loss = x.square().mean()
        del x
    act.transfers.drain()
    assert [storage_alive(key) for key in weak] == [None] * 8
    for key in weak:
        release_weak_storage(key)
    loss.backward()
    (crossing,) = act.transfers.crossings.values()
    (out_bytes, _), (in_bytes, _) = crossing.link.transferred()
    assert out_bytes == in_bytes == act.stats().offloaded_bytes
    assert crossing.launched_ahead >= 7
    nothing_left(act)


def test_retained_graphs_and_dropped_ones(make: Open, tier: dict[str, Any]) -> None:
    act = make(**tier, staging_bytes=4 * MIB, emulated_device=EmulatedLink(latency_s=0.001))
    runs: list[list[torch.Tensor]] = []
    for way in (act, None):
        weights = weights_of(5)
        with contextlib.nullcontext() if way is None else way.forward():
            loss = loss_of(weights, 3)
        for turn in range(3):
            loss.backward(retain_graph=turn < 2)
        for number in range(4):
            with contextlib.nullcontext() if way is None else way.forward():
                loss = loss_of(weights, number)
        del loss
        runs.append([weight.grad for weight in weights if weight.grad is not None])
    assert all(map(torch.equal, *runs))
    nothing_left(act)


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_a_pipeline(make: Open, tier: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    link = EmulatedLink(latency_s=rng.choice([0.0, 0.0005, 0.002]))
    window = rng.choice([0, NBYTES, 8 * NBYTES])
    act = make(
        **tier,
        schedule=rng.choice(["all", "auto"]),
        staging_bytes=rng.choice([1, 2, 8]) * MIB,
        device_window_bytes=window,
        emulated_device=link,
    )
    if rng.random() < 0.5:
        act.book.rates.update(link=Rates(Throughput(1e8, 1e8)), ssd=Rates(Throughput(5e7, 5e7)))
    order, open_now, begun = [], [], 0
    while len(order) < 24:
        if open_now and (begun == 12 or rng.random() < 0.5):
            order.append(("backward", open_now.pop(rng.randrange(len(open_now)))))
        elif begun < 12:
            order.append(("forward", begun))
            open_now.append(begun)
            begun += 1
    rows = [rng.choice([64, 300, 512]) for _ in range(12)]

    def run(act: offload.ActivationOffload | None) -> list[torch.Tensor]:
        weights, losses = weights_of(3), {}
        for kind, number in order:
            if kind == "forward":
                with contextlib.nullcontext() if act is None else act.forward():
                    losses[number] = loss_of(weights, number, rows[number])
            else:
                losses.pop(number).backward()
        return [weight.grad for weight in weights if weight.grad is not None]

    assert all(map(torch.equal, run(act), run(None)))
    nothing_left(act)


def test_a_region_that_staging_cannot_hold_stays_and_is_counted(make: Open) -> None:
    act = make(staging_bytes=NBYTES // 2, emulated_device=EmulatedLink())
    with pytest.warns(RuntimeWarning, match=f"no room in staging_bytes={NBYTES // 2}"):
        assert equal(train(act, 1), train(None, 1))
    assert act.stats().kept_bytes > 0


def test_a_full_host_tier_keeps_the_rest(make: Open) -> None:
    few = {"tier": "host", "path": (), "host_bytes": 2 * NBYTES + 8192}
    act = make(**few, emulated_device=EmulatedLink())
    with pytest.warns(RuntimeWarning, match="host_bytes"):
        assert equal(train(act, 2), train(None, 2))
    stats = act.stats()
    assert stats.kept_bytes > 0
    assert 0 < stats.host_peak_bytes <= 2 * NBYTES + 8192
    nothing_left(act)


def test_host_memory_takes_what_the_ssd_is_too_slow_for(make: Open) -> None:
    slow = FaultPlan(bytes_per_s=2e7)
    act = make(
        host_bytes=16 * MIB, staging_bytes=MIB, io_engine=slow, emulated_device=EmulatedLink()
    )
    assert equal(train(act, 1), train(None, 1))
    stats = act.stats()
    assert stats.host_peak_bytes > 4 * NBYTES
    assert stats.ssd_write_bytes > 0
    assert stats.kept_bytes == 0
    nothing_left(act)


def test_stats_say_by_which_way_the_bytes_go(make: Open, tier: dict[str, Any]) -> None:
    act = make(**tier, emulated_device=EmulatedLink())
    (link,) = act.stats().links
    past_host = bool(tier.get("gds"))
    assert link.pinned is not past_host
    assert link.pinned_reason == (
        "nothing is staged: all goes past host memory" if past_host else "emulated"
    )
    assert set(link.staging_numa_nodes) == set(act._stores.named())
    assert all(node >= -1 for node in link.staging_numa_nodes.values())
    assert make().stats().links == ()


def test_a_failed_write_is_an_error_and_nothing_hangs(make: Open) -> None:
    act = make(
        io_engine=FaultPlan(rules=[FaultRule(op="write", first=3, count=1, errno=5)]),
        emulated_device=EmulatedLink(),
    )
    with pytest.raises(OSError, match="write") as raised:  # noqa: PT012
        for _ in range(50):
            train(act, 1)
            act.transfers.drain()
    assert raised.value.errno == 5


def test_a_changed_byte_is_an_error(make: Open) -> None:
    rule = FaultRule(op="read", first=0, count=100, action="corrupt", nbytes=100)
    act = make(io_engine=FaultPlan(rules=[rule]), emulated_device=EmulatedLink())
    weights = weights_of(4)
    with act.forward():
        loss = loss_of(weights, 0)
    act.transfers.drain()
    with pytest.raises(OSError, match="other bytes than were written"):
        loss.backward()


def test_closing_waits_for_the_copies_under_way(make: Open, tier: dict[str, Any]) -> None:
    link = EmulatedLink(latency_s=0.01)
    act = make(**tier, emulated_device=link)
    with act.forward():
        loss = loss_of(weights_of(4), 0)
    act.close()
    assert link.pinned == {}
    with pytest.raises(RuntimeError, match="closed"):
        loss.backward()


def test_everything_is_written_though_copies_are_done_at_once(make: Open) -> None:
    act = make(emulated_device=EmulatedLink(), staging_bytes=2 * MIB)
    writes = next(iter(act.transfers.crossings.values()))._writes
    follow = writes.follow

    def dealt_with_at_once(*what: Any) -> None:
        follow(*what)
        writes.drain()

    writes.follow = dealt_with_at_once  # type: ignore[method-assign]
    for _ in range(3):
        with act.forward():
            loss = loss_of(weights_of(4), 0)
        act.transfers.drain()
        assert not act._stores.named()["ssd"].arena.stats()["used_bytes"], "all has left staging"
        loss.backward()
    assert act.stats().ssd_write_bytes >= act.stats().offloaded_bytes
    nothing_left(act)


def test_what_is_about_to_leave_does_not_count_as_held(make: Open) -> None:
    link = EmulatedLink(latency_s=0.02)
    act = make(schedule="auto", device_window_bytes=64 * MIB, emulated_device=link)
    assert equal(train(act, 4), train(None, 4))
    assert act.stats().still_held_bytes < 2 * NBYTES


class Held(EmulatedLink):
    """Begins no copy out before `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def copy_out(self, source: torch.Tensor, target: Buffer, made_on: Any) -> Moment:
        self._out.add(_Copy(lambda: None, 0, (self,)))
        return super().copy_out(source, target, made_on)

    def query(self) -> bool:
        return self.go.is_set()

    def synchronize(self) -> None:
        self.go.wait()


@pytest.mark.parametrize("filled_again", [False, True])
def test_a_storage_emptied_while_it_is_copied_is_an_error(make: Open, filled_again: bool) -> None:
    link = Held()
    act = make(emulated_device=link)
    weight = weights_of(1)[0]
    with act.forward():
        x = torch.ones(512, WIDTH)
        y = (x @ weight).sin() * 2
        nbytes = x.untyped_storage().nbytes()
        x.untyped_storage().resize_(0)
        if filled_again:
            taken = torch.zeros(512, WIDTH)
            x.untyped_storage().resize_(nbytes)
            del taken
        del x
    link.go.set()
    act._stores.drain()
    (crossing,) = act.transfers.crossings.values()
    crossing.drain()
    with pytest.raises(RuntimeError, match=r"emptied by its owner|freed before"):  # noqa: PT012
        crossing.settle()
        y.sum().backward()
    act.close()


def test_an_instance_nobody_holds_goes_with_its_thread_and_memory(make: Open) -> None:
    link = EmulatedLink()
    act = make(emulated_device=link)
    train(act, 2)
    gone = weakref.ref(act)
    make.made.clear()  # type: ignore[attr-defined]
    del act
    gc.collect()
    assert gone() is None
    assert link.pinned == {}


def test_an_error_of_the_device_reaches_the_training(make: Open) -> None:
    link = EmulatedLink()
    act = make(emulated_device=link)
    with act.forward():
        loss = loss_of(weights_of(2), 0)
    act.transfers.drain()
    (crossing,) = act.transfers.crossings.values()
    crossing._writes.error = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="the device is gone"):
        loss.backward()


def test_the_host_tier_needs_a_device(spill_dir: Any) -> None:
    with pytest.raises(ValueError, match="'host' needs a GPU"):
        offload.ActivationOffload(tier="host")


def test_tensors_in_host_memory_do_not_go_to_host_memory(
    make: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    act = make(tier="host", path=(), host_bytes=MIB)
    assert equal(train(act, 1), train(None, 1))
    assert act.stats().passed_through_bytes["on_host"] > 4 * NBYTES
    assert act.stats().offloaded_bytes == 0
