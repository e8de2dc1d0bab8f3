"""`torch.compile` around the model: the hooks stand outside of what is compiled."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import offload
from offload.device import EmulatedLink

Open = Callable[..., offload.ActivationOffload]
WIDTH, ROWS = 64, 256
LAYERS = 3


class Block(nn.Module):
    """What a transformer's layer does, attention and dropout included."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.drop(nn.functional.gelu(self.out(mixed)))


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(
    act: offload.ActivationOffload | None,
    compiled: Callable[..., Any],
    layer: type[nn.Module] = Block,
) -> list[Any]:
    torch.manual_seed(5)
    model = nn.Sequential(*(layer() for _ in range(LAYERS)))
    run = compiled(model)
    seen: list[Any] = []
    for step in range(4):
        x = torch.randn(4, ROWS, WIDTH, generator=torch.Generator().manual_seed(step))
        with contextlib.nullcontext() if act is None else act.forward():
            loss = run(x).square().mean()
        loss.backward()
        seen.append(loss.item().hex())
    return [*seen, *(parameter.grad for parameter in model.parameters())]


def by(backend: str) -> Callable[[nn.Module], Any]:
    return lambda model: torch.compile(model, backend=backend)


def layer_by_layer(model: nn.Module) -> Any:
    for layer in model.children():
        layer.compile(backend="aot_eager")
    return model


class Broken(Block):
    """A layer that is compiled in two parts, with code between that is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x).sin()
        torch._dynamo.graph_break()
        return torch.tanh(x) * 1.5


class Library(nn.Sequential):
    """What Dynamo leaves to PyTorch's own code, looking at each function that this calls."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))


@pytest.mark.parametrize("layer", [Block, Broken, Library])
def test_code_around_compiled_parts_has_the_same_bits(make: Open, layer: type[nn.Module]) -> None:
    def whole(model: nn.Module) -> nn.Module:
        model.compile(backend="aot_eager")
        return model

    act = make(min_tensor_bytes=16384)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo does not know how to trace")
        expected = trained(None, whole, layer)
        torch._dynamo.reset()
        found = trained(act, whole, layer)
    assert found[:4] == expected[:4]
    assert all(map(torch.equal, found[4:], expected[4:]))
    assert act.stats().offloaded_bytes > 4 * ROWS * WIDTH * 4 * LAYERS


@pytest.mark.parametrize("tier", ["ssd", "host"])
@pytest.mark.parametrize("schedule", ["all", "auto"])
@pytest.mark.parametrize(
    "compiled",
    [
        pytest.param(by("aot_eager"), id="aot_eager"),
        pytest.param(by("inductor"), id="inductor"),
        pytest.param(layer_by_layer, id="layers"),
    ],
)
def test_a_compiled_model_has_the_same_bits_with_and_without_offload(
    make: Open, compiled: Callable[..., Any], schedule: str, tier: str
) -> None:
    where = (
        {"tier": "host", "path": (), "emulated_device": EmulatedLink()} if tier == "host" else {}
    )
    act = make(schedule=schedule, min_tensor_bytes=16384, **where)
    expected = trained(None, compiled)
    graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    found = trained(act, compiled)
    assert counters["stats"]["unique_graphs"] == graphs, "nothing is compiled twice"
    assert not counters["graph_break"]
    assert found[:4] == expected[:4]
    assert all(map(torch.equal, found[4:], expected[4:]))
    assert act.stats().offloaded_bytes > 4 * ROWS * WIDTH * 4 * LAYERS
