"""Scheduled offload: bits stay equal whatever the schedule, the pipeline and the drive."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import offload
from offload.activations.rates import Rates, Throughput
from offload.native import FaultPlan, FaultRule

MIB = 1 << 20
WIDTH = 512
NBYTES = 4 * WIDTH * WIDTH


def block(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    for weight in weights:
        x = torch.tanh(x @ weight)
    return x


def weights_of(count: int, width: int = WIDTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(width, width, generator=generator) / width**0.5).requires_grad_()
        for _ in range(count)
    ]


def train(
    act: offload.ActivationOffload | None, rows: list[int], layers: int = 8
) -> tuple[list[str], list[torch.Tensor]]:
    """Take a step for each number of rows; return losses and the sums of gradients."""
    weights = weights_of(layers)
    losses = []
    for number, count in enumerate(rows):
        x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(number))
        with contextlib.nullcontext() if act is None else act.forward():
            loss = block(x, weights).square().mean()
        loss.backward()
        losses.append(loss.item().hex())
    return losses, [weight.grad for weight in weights if weight.grad is not None]


def same(act: offload.ActivationOffload, rows: list[int]) -> None:
    losses, grads = train(act, rows)
    expected_losses, expected = train(None, rows)
    assert losses == expected_losses
    assert all(map(torch.equal, grads, expected))
    assert len(grads) == len(expected)


def throttled(rate: float) -> FaultPlan:
    return FaultPlan(bytes_per_s=rate)


@pytest.fixture
def scheduled(make: Any) -> Callable[..., offload.ActivationOffload]:
    return lambda **settings: make(
        **{"schedule": "auto", "staging_bytes": 64 * MIB, "block_bytes": 1 << 18} | settings
    )


def test_the_first_step_offloads_everything_and_later_ones_follow_a_schedule(
    scheduled: Any,
) -> None:
    act = scheduled(spill_bytes=256 * MIB)
    same(act, [2048])
    first = act.stats()
    assert first.scheduled_to_stay_bytes == 0
    assert first.offloaded_bytes > 6 * 4 * 2048 * WIDTH
    for _ in range(3):
        same(act, [2048] * 2)
    assert act.book.planned >= 1
    assert act.stats().predicted_peak_bytes > 0


def test_a_slow_drive_keeps_more_than_a_fast_one(scheduled: Any) -> None:
    stayed = []
    for rate in (2e7, 20e9):
        act = scheduled(io_engine=throttled(rate), spill_bytes=256 * MIB)
        same(act, [1024] * 4)
        stayed.append(act.stats().scheduled_to_stay_bytes)
    assert stayed[0] > 2 * stayed[1]


def test_a_forward_waits_for_a_slow_drive_rather_than_exceed_memory_bytes(scheduled: Any) -> None:
    limit, count = 4 * MIB, 24
    act = scheduled(io_engine=throttled(3e7), memory_bytes=limit, tolerated_slowdown=0.0)
    start = torch.randn(MIB // 4, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def in_use() -> int:
        assert act._stores.ssd is not None
        stats = act._stores.ssd.arena.stats()
        return int(stats["used_bytes"] + stats["outside_bytes"]) + act.counters.staying_now

    for step in range(5):
        worst = 0
        x = start * 1.0
        with act.forward():
            for _ in range(count):
                x = torch.exp(-x)
                worst = max(worst, in_use())
        assert MIB <= worst <= limit, f"step {step}"
        x.sum().backward()
        assert not act.counters.staying_now
    stats = act.stats()
    assert stats.predicted_slowdown > 0
    assert stats.predicted_peak_bytes <= limit
    assert stats.stall_s > 0
    free = scheduled(io_engine=throttled(1e8))
    same(free, [64])
    assert free._stores.ssd.arena.allocate(63 * MIB, 0) is not None, "without memory_bytes"


def test_changing_shapes_each_find_their_schedule_and_new_ones_are_safe(scheduled: Any) -> None:
    act = scheduled(spill_bytes=256 * MIB)
    same(act, [1024, 2048, 1024, 2048, 1536, 1024, 1536, 2048, 1024])
    assert act.book.planned >= 3


def test_another_control_flow_in_the_middle_of_a_forward_is_noticed(scheduled: Any) -> None:
    act = scheduled()
    weights = weights_of(4)

    def step(run: Any, extra: bool) -> list[torch.Tensor]:
        x = torch.randn(1024, WIDTH, generator=torch.Generator().manual_seed(1))
        with run():
            x = block(x, weights[:2])
            if extra:
                x = torch.cat([x, x[:100]]).exp().mul(0.5)
            loss = block(x, weights[2:]).sum()
        return list(torch.autograd.grad(loss, weights))

    for extra in (False, False, True, False, True, True, False):
        expected = step(contextlib.nullcontext, extra)
        assert all(map(torch.equal, step(act.forward, extra), expected))
    assert len({plan.plan.sizes for plan in act.book._entries.values() if plan.plan}) == 2


def test_of_a_forward_whose_backward_is_next_nothing_leaves(make: Any, scheduled: Any) -> None:
    for act in (make(staging_bytes=64 * MIB), scheduled()):
        weights = weights_of(4)
        forward = act.forward()
        act.hint(next_backward=forward)
        with forward:
            loss = block(torch.ones(256, WIDTH), weights).sum()
        assert act.counters.staying_now > 0, "it counts, whatever has decided it"
        loss.backward()
        assert act.stats().offloaded_bytes == act.counters.staying_now == 0


def test_a_hint_begins_to_read_a_forward_that_has_ended(make: Any) -> None:
    act = make(staging_bytes=64 * MIB)
    weights = weights_of(4)
    forward = act.forward()
    with forward:
        loss = block(torch.ones(256, WIDTH), weights).sum()
    act.transfers.drain()
    act.hint(next_backward=forward)
    assert any(region.ahead for region in forward.regions)
    loss.backward()


def test_a_drive_that_was_slow_once_is_measured_again(make: Any) -> None:
    act = make(schedule="auto", staging_bytes=64 << 20, spill_bytes=256 << 20)
    weights = weights_of(4, 512)
    offloaded = []
    for step in range(40):
        if step < 3:  # what it did the first times
            act.book.rates["ssd"] = Rates(Throughput(1.0, 1.0))
        before = act.stats().offloaded_bytes
        with act.forward():
            loss = block(torch.ones(2048, 512), weights).sum()
        act.transfers.drain()
        loss.backward()
        del loss
        offloaded.append(act.stats().offloaded_bytes - before)
    assert 0 in offloaded, "at first all is thought to be better off in memory"
    assert sum(offloaded[-20:]) > 0
    assert act.book.rates["ssd"].throughput.write_bytes_per_s > 1e6


def legal_order(rng: random.Random, micro_batches: int, open_at_once: int) -> list[tuple[str, int]]:
    """Return forwards and backwards of micro-batches as some pipeline stage might run them."""
    waiting: list[int] = []
    order: list[tuple[str, int]] = []
    begun = 0
    while begun < micro_batches or waiting:
        forward = begun < micro_batches and len(waiting) < open_at_once
        if forward and (not waiting or rng.random() < 0.5):
            order.append(("forward", begun))
            waiting.append(begun)
            begun += 1
        else:
            order.append(("backward", waiting.pop(rng.randrange(len(waiting)))))
    return order


def on_the_drive(directory: str) -> int:
    """Return how long the files are that this process holds in `directory`, without a name."""
    held = {}
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = f"/proc/self/fd/{descriptor}"
            if os.readlink(name).startswith(f"{directory}/"):
                file = os.stat(name)
                held[file.st_ino] = file.st_size
    return sum(held.values())


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("one_thread")  # more would only wait for each other on so little work
@pytest.mark.filterwarnings("ignore:.*spill_bytes")
@settings(
    max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.integers(0, 2**32))
def test_any_order_of_a_pipeline_gives_the_same_bits_and_leaves_nothing(
    make: Any, seed: int
) -> None:
    rng = random.Random(seed)
    delays = [
        FaultRule(first=rng.randrange(40), count=rng.randint(1, 5), action="delay", delay_s=1e-3)
        for _ in range(rng.randint(0, 3))
    ]
    staging = rng.choice([1 << 16, 1 << 18, 1 << 20])
    spill_bytes = rng.choice([1 << 17, 1 << 30])
    act = make(
        schedule=rng.choice(["auto", "all"]),
        staging_bytes=staging,
        spill_bytes=spill_bytes,
        memory_bytes=rng.choice([None, 1 << 17]),
        io_engine=FaultPlan(rules=delays),
    )
    # So few bytes say nothing about a drive; this is what it is taken to do.
    rate = rng.choice([1e6, 1e8, 1e10])
    act.book.rates["ssd"] = Rates(Throughput(rate, rate))
    weights = weights_of(3, 32)
    rows = [rng.randint(1, 300) for _ in range(rng.randint(1, 2))]
    sums = []
    for run in (act, None):
        for weight in weights:
            weight.grad = None
        orders = random.Random(seed + 1)
        for _ in range(3):  # steps: the schedule of the first rules from the second on
            losses: dict[int, torch.Tensor] = {}
            for what, number in legal_order(orders, orders.randint(1, 5), orders.randint(1, 3)):
                if what == "backward":
                    losses.pop(number).backward()
                    continue
                x = torch.full((rows[number % len(rows)], 32), 0.1 * (number + 1))
                forward = contextlib.nullcontext() if run is None else run.forward()
                if run is not None and orders.random() < 0.2:
                    run.hint(next_backward=forward)
                elif run is None:
                    orders.random()
                with forward:
                    losses[number] = block(x, weights).sum()
                assert on_the_drive(act.config.path[0]) <= spill_bytes
        sums.append([weight.grad for weight in weights])
    assert all(map(torch.equal, *sums))
    event(f"planned: {act.book.planned > 0}")
    act.transfers.drain()  # a write under way still has its space
    stats = act.stats()
    assert stats.spill_bytes == 0
    if not stats.kept_bytes:  # what finds no space is kept outside of staging
        # Besides it only what must be there for the operator that wants it: an input and an output,
        # each of whole pages.
        pages = -(-max(rows) * 32 * 4 // 4096)
        assert stats.native_peak_bytes <= staging + 3 * pages * 4096
    assert act.forwards == set()
    assert act.transfers.ahead_bytes == 0
    act.close()


def test_small_tensors_are_part_of_the_limit_and_blocks_free_them(make: Any) -> None:
    small = NBYTES // 8
    for memory_bytes, repeats in ((1 << 30, False), (10 * small, True)):
        act = make(schedule="auto", memory_bytes=memory_bytes, min_tensor_bytes=NBYTES)
        act.book.rates["ssd"] = Rates(Throughput(1e12, 1e12))
        weights = weights_of(12)
        for _ in range(10):
            with act.forward():
                large = torch.tanh(torch.ones(WIDTH, WIDTH, requires_grad=True) * 2)
                x = large[: WIDTH // 8] * 1.0
                for weight in weights:
                    x = act.block(lambda y, w=weight: torch.tanh(torch.sin(y @ w)), x)
                loss = x.square().mean() + large.square().mean()
            loss.backward()
        stats = act.stats()
        assert (stats.recomputed_blocks > 0) == repeats
        if not repeats:
            assert stats.predicted_peak_bytes >= 2 * 12 * small


def test_another_instances_forward_is_no_hint(make: Any) -> None:
    act, other = make(), make()
    with other.forward() as forward:
        loss = block(torch.randn(WIDTH, WIDTH), weights_of(2)).sum()
    with pytest.raises(ValueError, match="of another ActivationOffload"):
        act.hint(next_backward=forward)
    loss.backward()
    assert act.transfers.ahead_bytes == other.transfers.ahead_bytes == 0


def test_a_backward_inside_of_its_forward_is_told(make: Any) -> None:
    act = make(schedule="auto")
    weights = weights_of(2)

    def steps() -> None:
        for _ in range(2):
            with act.forward():
                block(torch.randn(WIDTH, WIDTH), weights).sum().backward()

    with pytest.warns(RuntimeWarning, match=r"ran inside of its `with act.forward\(\):`") as said:
        steps()
    assert [warning.filename for warning in said] == [__file__]


def test_what_was_held_in_the_first_steps_only_leaves_later(make: Any) -> None:
    act = make(schedule="auto", staging_bytes=64 * MIB, spill_bytes=256 * MIB)
    act.book.rates["ssd"] = Rates(Throughput(1e12, 1e12))
    weights, log, offloaded = weights_of(6), [], []
    for step in range(6):
        before = act.stats().offloaded_bytes
        with act.forward():
            x = torch.ones(WIDTH, WIDTH)
            for weight in weights:
                x = torch.tanh(x @ weight)
                if step == 0:
                    log.append(x)
            loss = x.square().mean()
        act.transfers.drain()
        loss.backward()
        log.clear()
        del x
        offloaded.append(act.stats().offloaded_bytes - before)
    assert offloaded[-1] >= 4 * NBYTES
