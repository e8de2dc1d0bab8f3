"""Blocks that may not be run again are not, and what a repeated one uses must be as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from offload.activations.rates import Rates, Throughput
from offload.activations.repeatable import Marks

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


class HandMade(Plain):
    """A batch norm whose kernel writes to buffers that nobody calls running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(super().forward(x), self.mean, self.var, training=True)


class Drawing(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (torch.rand(x.shape, generator=self.own) > 0.1)


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
@pytest.mark.parametrize("kind", [Normed, InPlaceFirst, Counting, HandMade, Drawing])
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
@pytest.mark.parametrize("method", [False, True])
def test_a_tensor_changed_before_a_repeated_blocks_backward_is_an_error(
    limited: Any, what: str, method: bool
) -> None:
    act, layers = limited(), layers_of(Plain)
    if method:
        run = act.block
        act.block = lambda layer, x: run(layer.forward, x)
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


class Switched(nn.Module):
    """Computes something else in training, of the same shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(torch.sin(self.dropout(self.linear(x))))
        return x + (2 * y if self.training else y)


@pytest.mark.filterwarnings("ignore:memory_bytes=0 cannot be met")
def test_a_repeated_block_runs_in_the_mode_it_had(limited: Any) -> None:
    act, layers, plain = limited(), layers_of(Switched), layers_of(Switched)
    for seed in range(STEPS):
        for model in (layers, plain):
            nn.ModuleList(model).train()
        found = step(act, layers, seed, lambda: nn.ModuleList(layers).eval())
        assert all(map(torch.equal, found, step(None, plain, seed)))
        assert not any(module.training for layer in layers for module in layer.modules())
    assert act.stats().recomputed_blocks > 0


@pytest.mark.filterwarnings("ignore:memory_bytes=0 cannot be met")
def test_a_replaced_parameter_is_an_error_and_a_lent_one_is_never_repeated(limited: Any) -> None:
    act, layers, plain = limited(), layers_of(Plain), layers_of(Plain)
    for seed in range(STEPS):
        step(act, layers, seed)
        step(None, plain, seed)

    def replace() -> None:
        layers[2].weight = nn.Parameter(layers[2].weight.detach().clone())

    with pytest.raises(RuntimeError, match=r"'weight' of shape .* was replaced"):
        step(act, layers, STEPS, replace)

    def lent(layers: list[Any], blocks: bool) -> list[torch.Tensor]:
        fast = [{"weight": (2 * layer.weight).detach().requires_grad_()} for layer in layers]
        x = torch.linspace(-1, 1, WIDTH * WIDTH).view(WIDTH, WIDTH)
        with act.forward() if blocks else contextlib.nullcontext():
            for layer, weights in zip(layers, fast, strict=True):

                def call(inner: Any, value: torch.Tensor) -> torch.Tensor:
                    return act.block(inner, value) if blocks else inner(value)

                class Around(nn.Module):
                    def __init__(self, inner: nn.Module) -> None:
                        super().__init__()
                        self.inner = inner

                    def forward(self, value: torch.Tensor) -> torch.Tensor:
                        return call(self.inner, value)

                named = {f"inner.{name}": value for name, value in weights.items()}
                x = torch.func.functional_call(Around(layer), named, (x,))
            loss = x.square().mean()
        return list(torch.autograd.grad(loss, [each["weight"] for each in fast]))

    for _ in range(STEPS):
        assert all(map(torch.equal, lent(layers, True), lent(layers, False)))


@pytest.mark.filterwarnings("ignore:.*never recomputed", "ignore:memory_bytes=0 cannot be met")
def test_a_method_that_changes_its_modules_buffers_is_never_repeated(limited: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("mean", torch.zeros(WIDTH))

        def layer(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.tanh(torch.sin(self.linear(x)))
            self.mean.lerp_(y.detach().mean(0), 0.1)
            return x + y * self.mean

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    def closing_over(net: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda value: net.layer(value + 0)

    act, nets, plain = limited(), layers_of(Net), layers_of(Net)
    for ways in (lambda net: net.layer, closing_over):
        for seed in range(STEPS):
            torch.manual_seed(seed)
            first = torch.randn(WIDTH, WIDTH, requires_grad=True)
            with act.forward():
                x = first * 2
                for net in nets:
                    x = act.block(ways(net), x)
                loss = x.square().mean()
            loss.backward()
            step(None, plain, seed)
        for net, other in zip(nets, plain, strict=True):
            assert torch.equal(net.mean, other.mean)
            assert torch.equal(net.linear.weight.grad, other.linear.weight.grad)
    assert act.stats().recomputed_blocks == 0


@pytest.mark.filterwarnings("ignore:.*never recomputed", "ignore:memory_bytes=0 cannot be met")
def test_compiled_layers_with_running_statistics_are_never_repeated(limited: Any) -> None:
    act, layers, plain = limited(), layers_of(Normed), layers_of(Normed)
    for layer in layers:
        layer.compile(backend="eager")
    for seed in range(STEPS):
        assert all(map(torch.equal, step(act, layers, seed), step(None, plain, seed)))


@pytest.mark.filterwarnings("ignore:.*never recomputed", "ignore:memory_bytes=0 cannot be met")
def test_two_models_with_the_same_shapes_are_two_kinds_of_forward(limited: Any) -> None:
    act = limited()
    kinds = [(layers_of(kind), layers_of(kind)) for kind in (Plain, Normed)]
    for seed in range(STEPS):
        for layers, plain in kinds if seed < STEPS // 2 else reversed(kinds):
            assert all(map(torch.equal, step(act, layers, seed), step(None, plain, seed)))
    assert act.stats().recomputed_blocks > 0


@pytest.mark.filterwarnings("ignore:.*never recomputed", "ignore:memory_bytes=0 cannot be met")
def test_a_later_block_that_changes_its_mode_is_chosen_for_anew(limited: Any) -> None:
    act, layers, plain = limited(), layers_of(Normed), layers_of(Normed)
    for seed in range(3 * STEPS):
        for each in (layers, plain):
            nn.ModuleList(each).eval()
            nn.ModuleList(each[2:]).train(STEPS <= seed < 2 * STEPS)
        before = act.stats().recomputed_blocks
        assert all(map(torch.equal, step(act, layers, seed), step(None, plain, seed)))
        repeated = act.stats().recomputed_blocks - before
    assert repeated >= DEPTH - 1, "after the third change as after the first"


class ReadsTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = ctx.saved_tensors[0]
        b = ctx.saved_tensors[1]
        return grad @ b.t(), a.t() @ grad


@pytest.mark.filterwarnings("ignore:memory_bytes=0 cannot be met")
def test_a_backward_that_reads_its_tensors_twice_is_never_repeated(limited: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(ReadsTwice.apply(torch.sin(x), self.weight))

    act, layers, plain = limited(), layers_of(Twice), layers_of(Twice)
    for seed in range(STEPS):
        assert all(map(torch.equal, step(act, layers, seed), step(None, plain, seed)))
    assert act.stats().recomputed_blocks == 0


@pytest.mark.filterwarnings("ignore:memory_bytes=0 cannot be met")
def test_a_checkpoint_around_blocks_runs_them_as_it_pleases(limited: Any) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.act, self.on = Plain(), None, False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            call = (lambda y: self.act.block(self.inner, y)) if self.act else self.inner
            return checkpoint(call, x, use_reentrant=False) if self.on else call(x)

    act, plain = limited(), layers_of(Checkpointed)
    layers = layers_of(Checkpointed)
    for seed in range(2 * STEPS):
        for layer in layers:
            layer.act, layer.on = act, seed >= STEPS
        torch.manual_seed(seed)
        first = torch.randn(WIDTH, WIDTH, requires_grad=True)
        with act.forward():
            x = first * 2
            for layer in layers:
                x = layer(x)
            loss = x.square().mean()
        loss.backward()
        assert torch.equal(first.grad, step(None, plain, seed)[-1])
    assert act.stats().recomputed_blocks > 0


def test_modules_that_are_gone_leave_no_number_behind() -> None:
    marks, kept = Marks(), nn.Identity()
    number = marks.of(kept, ())
    for _ in range(3000):
        assert marks.of(nn.Identity(), ()) != number
    assert len(marks._numbers) <= 2049
    assert marks.of(kept, ()) == number
