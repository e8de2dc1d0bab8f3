"""Tests of `offload.activations.blocks`: what does not fit is computed again, to the same bits."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.activations import blocks
from offload.activations.rates import Rates, Throughput
from offload.device import EmulatedLink

WIDTH, ROWS, DEPTH = 64, 64, 6
NBYTES = ROWS * WIDTH * 4
STEPS = 6
DEAF, FAST = Throughput(1.0, 1.0), Throughput(1e12, 1e12)


class Layer(torch.nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.dropout = dropout
        self.ran: list[None] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ran.append(None)
        y = torch.sin(x @ self.weight)
        return x + F.dropout(torch.cos(y * y), self.dropout, training=True)


def layers_of(dropout: float = 0.0, depth: int = DEPTH) -> list[Layer]:
    torch.manual_seed(0)
    return [Layer(dropout) for _ in range(depth)]


def step(act: Any, layers: list[Layer], seed: int, rows: int = ROWS) -> list[torch.Tensor]:
    """Return loss and gradients of a step; `act` None: without offload."""
    for layer in layers:
        layer.weight.grad = None
    torch.manual_seed(seed)
    x = torch.randn(rows, WIDTH)

    def forward() -> torch.Tensor:
        y = x
        for layer in layers:
            y = act.block(layer, y) if act else layer(y)
        return y.square().sum()

    if act:
        with act.forward():
            loss = forward()
    else:
        loss = forward()
    loss.backward()
    return [loss.detach(), *(layer.weight.grad for layer in layers)]


@pytest.fixture
def limited(make: Any) -> Callable[..., Any]:
    """Make an instance whose drive is taken to be as fast as is said."""

    def of(memory_bytes: int | None, drive: Throughput = DEAF, **rest: Any) -> Any:
        act = make(schedule="auto", memory_bytes=memory_bytes, **rest)
        act.book.rates["ssd"] = Rates(drive)
        return act

    return of


def repeats(layers: list[Layer]) -> list[bool]:
    """Say which layers ran twice since the last call."""
    found = [len(layer.ran) == 2 for layer in layers]
    for layer in layers:
        layer.ran.clear()
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("memory_bytes", [0, 10 * NBYTES, 15 * NBYTES, 1 << 40])
def test_with_any_limit_the_bits_are_those_without_offload(
    limited: Any, dropout: float, memory_bytes: int
) -> None:
    act, layers = limited(memory_bytes), layers_of(dropout)
    for seed in range(STEPS):
        found = step(act, layers, seed)
        assert all(map(torch.equal, found, step(None, layers, seed)))


def test_a_slow_drive_and_little_memory_repeat_as_many_layers_as_must(limited: Any) -> None:
    layers = layers_of()
    counts = []
    for memory_bytes in (0, 10 * NBYTES, 16 * NBYTES, 1 << 40):
        act = limited(memory_bytes)
        for seed in range(STEPS):
            repeats(layers)
            before = act.stats().recomputed_blocks
            step(act, layers, seed)
        counts.append(sum(repeats(layers)))
        assert act.stats().recomputed_blocks - before == counts[-1]
    assert counts[0] >= DEPTH - 1
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[2] < counts[0]
    assert counts[3] == 0


def test_what_is_planned_fits_the_limit(limited: Any) -> None:
    layers = layers_of()
    act = limited(12 * NBYTES)
    for seed in range(2 * STEPS):  # a choice that takes more than was thought is made again
        step(act, layers, seed)
    assert 0 < act.stats().predicted_peak_bytes <= 12 * NBYTES


def test_a_fast_drive_or_no_limit_repeats_nothing(limited: Any) -> None:
    for act in (limited(4 * NBYTES, FAST), limited(None)):
        layers = layers_of()
        for seed in range(STEPS):
            step(act, layers, seed)
        assert all(len(layer.ran) == STEPS for layer in layers)


def test_a_repeated_layer_has_only_what_enters_it_offloaded(limited: Any) -> None:
    act, layers = limited(0), layers_of()
    offloaded = []
    for seed in range(STEPS):
        before = act.stats().offloaded_bytes + act.stats().scheduled_to_stay_bytes
        step(act, layers, seed)
        offloaded.append(act.stats().offloaded_bytes + act.stats().scheduled_to_stay_bytes - before)
    assert offloaded[0] > 2.5 * DEPTH * NBYTES
    assert offloaded[-1] <= 1.5 * DEPTH * NBYTES


def test_another_shape_is_chosen_for_by_itself(limited: Any) -> None:
    act, layers = limited(12 * NBYTES), layers_of()
    for seed in range(2 * STEPS):
        rows = ROWS // 4 if seed % 2 else ROWS
        repeats(layers)
        found = step(act, layers, seed, rows)
        again = any(repeats(layers))
        assert all(map(torch.equal, found, step(None, layers, seed, rows)))
        if seed >= 2 * STEPS - 2:
            assert again == (rows == ROWS), "a quarter of the rows fits as it is"


def test_a_block_outside_of_a_forward_is_a_call(limited: Any) -> None:
    act, layer = limited(0), Layer()
    x = torch.randn(ROWS, WIDTH)
    assert torch.equal(act.block(layer, x), layer(x))
    with act.forward(), torch.no_grad():
        act.block(layer, x)
    assert len(layer.ran) == 3


def test_blocks_inside_of_a_block_are_calls_and_repeat_with_it(limited: Any) -> None:
    act, layers = limited(0), layers_of()

    def pair(first: Layer, second: Layer) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: act.block(second, act.block(first, x))

    pairs = [pair(one, other) for one, other in zip(layers[::2], layers[1::2], strict=True)]
    for seed in range(STEPS):
        torch.manual_seed(seed)
        x = torch.randn(ROWS, WIDTH)
        for layer in layers:
            layer.weight.grad = None
            layer.ran.clear()
        with act.forward():
            y = x
            for each in pairs:
                y = act.block(each, y)
            loss = y.square().sum()
        loss.backward()
        found = [layer.weight.grad for layer in layers]
        again = repeats(layers)
        assert all(map(torch.equal, found, step(None, layers, seed)[1:]))
    assert any(again)
    assert again[::2] == again[1::2]


def test_an_error_inside_a_block_leaves_the_next_forward_whole(limited: Any) -> None:
    act, layers = limited(0), layers_of()

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("on purpose")

    for seed in range(STEPS):
        with pytest.raises(KeyError, match="on purpose"), act.forward():
            act.block(broken, act.block(layers[0], torch.randn(ROWS, WIDTH)))
        assert act.running.current() is None
        found = step(act, layers, seed)
        assert all(map(torch.equal, found, step(None, layers, seed)))
    act.transfers.drain()
    assert act.stats().spill_bytes == 0


def test_several_results_and_other_arguments_pass(limited: Any) -> None:
    act = limited(0)
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def two(x: torch.Tensor, scale: float, name: str) -> tuple[torch.Tensor, str]:
        return torch.sin(x @ weight) * scale, name

    for _ in range(STEPS):
        weight.grad = None
        x = torch.ones(ROWS, WIDTH)
        with act.forward():
            for _ in range(3):
                x, name = act.block(two, x, 0.5, "same")
            loss = x.sum()
        loss.backward()
        assert name == "same"
        assert weight.grad is not None


@settings(
    max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.integers(0, 2**32))
def test_interleaved_forwards_with_any_limits_give_the_same_bits(limited: Any, seed: int) -> None:
    rng = random.Random(seed)
    drive = Throughput(rng.choice([1.0, 1e6, 1e9]), rng.choice([1.0, 1e6, 1e9]))
    act = limited(rng.randint(0, 25) * NBYTES, drive, staging_bytes=rng.choice([1 << 16, 1 << 20]))
    layers = layers_of(rng.choice([0.0, 0.2]), depth=4)
    rows = [rng.choice([ROWS, ROWS // 2]) for _ in range(3)]
    gradients = []
    for mode in (act, None):
        order = random.Random(seed)
        for _ in range(3):
            for layer in layers:
                layer.weight.grad = None
            losses = []
            for micro, count in enumerate(rows):
                torch.manual_seed(micro)
                y = torch.randn(count, WIDTH)
                if mode is None:
                    for layer in layers:
                        y = layer(y)
                    losses.append(y.square().sum())
                    continue
                with mode.forward():
                    for layer in layers:
                        y = mode.block(layer, y)
                    losses.append(y.square().sum())
            order.shuffle(losses)
            for loss in losses:
                loss.backward()
            del losses, loss
        gradients.append([layer.weight.grad for layer in layers])
    assert all(map(torch.equal, *gradients))
    act.transfers.drain()
    assert act.stats().spill_bytes == 0
    act.close()


def test_blocks_whose_arguments_are_in_containers_or_that_have_none_pass_on_a_device(
    limited: Any,
) -> None:
    layers = layers_of(depth=3)
    wrapped = torch.randn(ROWS, WIDTH)
    calls: list[Callable[..., Any]] = [
        lambda: (layers[0](wrapped),),
        lambda inputs: (layers[0](inputs["x"]),),
    ]
    for first, args in zip(calls, ([], [{"x": wrapped}]), strict=True):
        act = limited(
            2 * NBYTES,
            tier="host",
            path=(),
            host_bytes=1 << 22,
            emulated_device=EmulatedLink(),
        )
        del act.book.rates["ssd"]
        for _ in range(4):
            expected = None
            for run in (act, None):
                for layer in layers:
                    layer.weight.grad = None
                with contextlib.nullcontext() if run is None else run.forward():
                    (y,) = first(*args) if run is None else run.block(first, *args)
                    for layer in layers[1:]:
                        y = layer(y) if run is None else run.block(layer, y)
                    loss = y.square().sum()
                loss.backward()
                found = [layer.weight.grad for layer in layers]
                expected = found if expected is None else expected
                assert all(map(torch.equal, found, expected))
            assert act.stats().offloaded_bytes > 0
        assert not act.book._failure


def test_a_step_that_cannot_be_learned_from_leaves_the_next_ones_whole(
    limited: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = limited(2 * NBYTES)
    layers = layers_of(depth=3)

    def learn(*_args: object) -> None:
        raise ArithmeticError("broken")

    monkeypatch.setattr(act.book, "learn", learn)
    expected = step(None, layers, 0)
    assert all(map(torch.equal, step(act, layers, 0), expected))
    with pytest.warns(RuntimeWarning, match="ArithmeticError: broken"):
        assert all(map(torch.equal, step(act, layers, 0), expected))
    act.transfers.drain()  # a write under way has its space until it ends
    assert act.stats().spill_bytes == 0
    assert not act._ending


def test_what_enters_a_block_in_a_container_is_known_and_leaves(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = layers_of(depth=4)
    act = make(schedule="all")
    act.book.blocks.wanted = True
    monkeypatch.setattr(act.book, "recompute_of", lambda _key: frozenset(range(4)))
    monkeypatch.setattr(act.book.blocks, "is_like", lambda *_block: True)
    y = torch.randn(ROWS, WIDTH)
    forward = act.forward()
    with forward:
        for layer in layers:
            y = act.block(lambda pair, layer=layer: layer(pair[0]), (y, None))
        loss = y.square().sum()
    assert repeats(layers) == [False] * 4
    assert all(noted.enters for noted in forward.blocks.noted[1:])
    assert act.stats().offloaded_bytes >= 4 * NBYTES
    del y
    act.transfers.drain()
    assert act.stats().still_held_bytes <= NBYTES, "the last output, by this test"
    loss.backward()
    assert [len(layer.ran) for layer in layers] == [1] * 4
    assert act.stats().recomputed_blocks == 4


def test_a_limit_that_no_block_can_help_to_meet_is_told(limited: Any) -> None:
    act = limited(1)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)

    def steps(count: int) -> None:
        for _ in range(count):
            with act.forward():
                y = x
                for _ in range(4):
                    y = act.block(torch.sin, y)  # saves what enters it, and nothing else
                loss = y.sum()
            loss.backward()

    with pytest.warns(RuntimeWarning, match="memory_bytes=1 cannot be met"):
        steps(STEPS)
    assert act.stats().recomputed_blocks == 0


@pytest.mark.parametrize("drive", [DEAF, FAST])
def test_a_step_that_may_be_longer_repeats_where_the_drive_is_no_help(
    limited: Any, drive: Throughput
) -> None:
    act, layers = limited(None, drive, tolerated_slowdown=5.0), layers_of()
    for seed in range(STEPS):
        repeats(layers)
        assert all(map(torch.equal, step(act, layers, seed), step(None, layers, seed)))
    repeats(layers)
    step(act, layers, STEPS)
    assert any(repeats(layers)) == (drive is DEAF)


@pytest.mark.parametrize("limit", [12, 15])
def test_a_choice_made_anew_for_another_drive_fits_again(
    limited: Any, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(Rates, "observe", lambda *_: True)  # it does what is said, and is seen to
    act, layers = limited(limit * NBYTES), layers_of()
    for rate in (1.0, 1.4, 1.0, 1.4):
        act.book.rates["ssd"].throughput = Throughput(rate, rate)
        for seed in range(40):
            step(act, layers, seed)
        assert act.stats().predicted_peak_bytes <= limit * NBYTES
    assert not act.book.unmet_bytes


@pytest.mark.parametrize("memory_bytes", [None, 1 << 30])
def test_a_mask_on_the_host_does_not_say_where_a_forward_computes(
    make: Any, memory_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = make(memory_bytes=memory_bytes, schedule="auto")
    mask, there = torch.ones(4), SimpleNamespace(is_cpu=False, shape=(4,))
    monkeypatch.setattr(blocks, "can_offload", lambda tensor: True)
    met: list[Any] = []
    with act.forward() as forward:
        monkeypatch.setattr(forward, "meet", met.append)
        forward.blocks._mark(forward, torch.sin, (), [mask, there])
    assert met == [there]
