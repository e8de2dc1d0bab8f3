"""What no version tells is seen, and what a checkpoint restores is not taken for a change."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offload.activations.rates import Rates, Throughput
from offload.activations.unversioned import Unversioned


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([1.0, float("nan")]))
        self.register_buffer("turned", torch.ones(4, 6).t())
        self.register_buffer("nothing", None)
        self.register_buffer("empty", torch.ones(0))
        self.register_buffer("spread", torch.eye(3).to_sparse())
        self.generator = torch.Generator().manual_seed(1)
        self.cached: Any = None


def into_numpy(layer: Any) -> None:
    layer.turned.numpy()[2, 1] = 3.0


def batch_norm(layer: Any) -> None:
    mean, var = layer.mean, torch.ones(2)
    torch.nn.functional.batch_norm(torch.randn(8, 2), mean, var, training=True)


def draw(layer: Any) -> None:
    random.random()


CHANGES: dict[str, Callable[[Any], object]] = {
    "data": lambda layer: layer.mean.data.add_(1.0),
    "numpy": into_numpy,
    "batch norm": batch_norm,
    "generator": lambda layer: torch.rand(1, generator=layer.generator),
}
LEARNING: dict[str, Callable[[Any], object]] = {
    "random": draw,
    "numpy.random": lambda layer: np.random.rand(),
}


def unchanged_by(change: Callable[[Any], object], *, learning: bool, **how: bool) -> bool:
    layer = Layer()
    before = Unversioned((), learning=learning)
    before.note_module(layer, **how)
    change(layer)
    return before.same()


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("learning", [True, False])
def test_what_changes_behind_the_version_counter_is_seen(kind: str, learning: bool) -> None:
    assert not unchanged_by(CHANGES[kind], learning=learning)


@pytest.mark.parametrize("kind", LEARNING)
def test_what_others_may_draw_from_as_well_is_seen_while_learning_only(kind: str) -> None:
    assert not unchanged_by(LEARNING[kind], learning=True)
    assert unchanged_by(LEARNING[kind], learning=False)


def harmless(layer: Any) -> None:
    layer.cached = torch.ones(2)
    torch.rand(2)
    torch.rand(2, generator=torch.default_generator)


@pytest.mark.parametrize("learning", [True, False])
def test_a_cache_and_pytorchs_own_generator_are_no_change(learning: bool) -> None:
    assert unchanged_by(harmless, learning=learning)
    seen = Unversioned((torch.default_generator,), learning=learning)
    torch.rand(2)
    assert seen.same()


def test_a_generator_that_a_block_is_given_is_seen() -> None:
    generator = torch.Generator()
    seen = Unversioned((generator,), learning=False)
    assert seen.same()
    torch.rand(1, generator=generator)
    assert not seen.same()


def test_what_is_merely_reached_is_looked_at_while_learning_only() -> None:
    change = CHANGES["data"]
    assert not unchanged_by(change, learning=True, merely_reached=True)
    assert unchanged_by(change, learning=False, merely_reached=True)


class Fading(nn.Module):
    """Counts its calls in an attribute, and does something else in each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(64))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.sin(torch.sin(x @ self.weight) / self.calls)


@pytest.mark.filterwarnings("ignore:memory_bytes=0 cannot be met")
def test_a_repeated_block_has_the_attributes_that_it_had(make: Any) -> None:
    act = make(schedule="auto", memory_bytes=0)
    act.book.rates["ssd"] = Rates(Throughput(1.0, 1.0))
    for run in (layers := [Fading() for _ in range(4)], plain := [Fading() for _ in range(4)]):
        for number in range(8):
            with act.forward() if run is layers else contextlib.nullcontext():
                x = torch.randn(64, 64, generator=torch.Generator().manual_seed(number))
                for layer in run:
                    x = act.block(layer, x) if run is layers else layer(x)
            x.sum().backward()
    assert act.stats().recomputed_blocks > 0
    assert [layer.calls for layer in layers] == [8] * 4
    assert all(
        torch.equal(one.weight.grad, other.weight.grad)
        for one, other in zip(layers, plain, strict=True)
    )
