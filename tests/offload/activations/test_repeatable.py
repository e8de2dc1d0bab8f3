"""Blocks that may not be run again are not, and what a repeated one uses must be as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from offload.activations.rates import Rates, Throughput

WIDTH, DEPTH, STEPS = 64, 4, 8


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.register_buffer("scale", torch.full((WIDTH,), 1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.sin(torch.sin(x @ self.weight) @ self.weight) * self.scale


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.norm(self.linear(x)))


class InPlaceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.sin(self.linear(self.relu(x))))


class Counting(nn.Module):
    """Has a buffer that is replaced, not changed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return torch.tanh(torch.sin(self.linear(x))) * self.calls


def layers_of(kind: Callable[[], nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [kind() for _ in range(DEPTH)]


@pytest.fixture
def limited(make: Any) -> Callable[[], Any]:
    """Make an instance that recomputes all that it may: its drive takes nothing."""

    def of() -> Any:
        act = make(schedule="auto", memory_bytes=0)
        act.book.rates["ssd"] = Rates(Throughput(1.0, 1.0))
        return act

    return of


def step(act: Any, layers: list[Any], seed: int, between: Any = None) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    first = torch.randn(WIDTH, WIDTH, requires_grad=True)
    with contextlib.nullcontext() if act is None else act.forward():
        x = first * 2
        for layer in layers:
            x = layer(x) if act is None else act.block(layer, x)
        loss = x.square().mean()
    if between:
        between()
    loss.backward()
    values = [*(value for layer in layers for value in layer.state_dict().values())]
    grads = [parameter.grad for layer in layers for parameter in layer.parameters()]
    return [value.clone() for value in (*values, *grads, first.grad)]


@pytest.mark.filterwarnings("ignore:memory_bytes=0 cannot be met")
@pytest.mark.parametrize("kind", [Normed, InPlaceFirst, Counting])
def test_a_block_that_changes_what_it_uses_is_not_run_again(limited: Any, kind: Any) -> None:
    act, layers, plain = limited(), layers_of(kind), layers_of(kind)

    def train() -> None:
        for seed in range(STEPS):
            assert all(map(torch.equal, step(act, layers, seed), step(None, plain, seed)))

    with pytest.warns(RuntimeWarning, match=f"{DEPTH} of them. change .* never recomputed"):
        train()
    assert act.stats().recomputed_blocks == 0


@pytest.mark.filterwarnings("ignore:memory_bytes=0 cannot be met")
@pytest.mark.parametrize("what", ["weight", "scale"])
def test_a_tensor_changed_before_a_repeated_blocks_backward_is_an_error(
    limited: Any, what: str
) -> None:
    act, layers = limited(), layers_of(Plain)
    for seed in range(STEPS):
        step(act, layers, seed)
    assert act.stats().recomputed_blocks > 0

    def change() -> None:
        with torch.no_grad():
            getattr(layers[2], what).add_(0.1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(act, layers, STEPS, change)
    step(act, layers, STEPS + 1)


@pytest.mark.filterwarnings("ignore:memory_bytes=0 cannot be met")
def test_a_parameter_used_without_a_module_is_seen_as_well(limited: Any) -> None:
    act, weights = limited(), [nn.Parameter(torch.randn(WIDTH, WIDTH) / 8) for _ in range(DEPTH)]

    class Function:
        def __init__(self, weight: nn.Parameter) -> None:
            self.weight = weight

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(torch.sin(torch.sin(x) @ self.weight))

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {}

        def parameters(self) -> list[torch.Tensor]:
            return [self.weight]

    functions = [Function(weight) for weight in weights]
    for seed in range(STEPS):
        step(act, functions, seed)
    assert act.stats().recomputed_blocks > 0

    def change() -> None:
        with torch.no_grad():
            weights[1].mul_(2)

    with pytest.raises(RuntimeError, match="that a recomputed block uses"):
        step(act, functions, STEPS, change)


@pytest.mark.filterwarnings("ignore:memory_bytes=0 cannot be met")
def test_a_block_that_begins_to_change_its_buffers_is_refused_by_number(limited: Any) -> None:
    act, layers = limited(), layers_of(Plain)
    for seed in range(STEPS):
        step(act, layers, seed)
    assert act.stats().recomputed_blocks > 0
    layers[1].register_forward_hook(lambda module, *_: module.scale.add_(0.1))
    with pytest.raises(RuntimeError, match="block 1 of a forward changes"):
        step(act, layers, STEPS)


def test_evaluation_is_another_kind_of_forward_than_training(limited: Any) -> None:
    act, layers = limited(), layers_of(Normed)
    plain = layers_of(Normed)
    for seed in range(2 * STEPS):
        for layer in (*layers, *plain):
            layer.train(seed >= STEPS)
        assert all(map(torch.equal, step(act, layers, seed), step(None, plain, seed)))
        if seed == STEPS - 1:
            assert act.stats().recomputed_blocks > 0, "running statistics are only read"
