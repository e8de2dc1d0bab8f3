"""What replaces a saved tensor keeps PyTorch's in-place check, no graph, and the same bits."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from offload.activations.saved import Kept, RecastParameter

SIZE = 64
SETTINGS: dict[str, dict[str, Any]] = {
    "offloaded": {},
    "kept because the spill is full": {"spill_bytes": 4096, "staging_bytes": 8192},
    "passed through": {"min_tensor_bytes": 1 << 30},
}


def ones(*, grad: bool = False) -> torch.Tensor:
    return torch.ones(SIZE, SIZE, requires_grad=grad)


CHANGES: dict[str, Any] = {
    "nothing": lambda h: None,
    "itself": lambda h: h.mul_(2),
    "a view": lambda h: h[3:].zero_(),
    "a view of a view": lambda h: h.t()[1:].add_(1),
    "a detached alias": lambda h: h.detach().mul_(2),
    "out=": lambda h: torch.neg(h, out=h),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("written", [True, False], ids=["written", "at once"])
def test_a_change_in_place_is_the_error_that_it_is_without_hooks(
    make: Any, same_bits: Any, settings: dict[str, Any], change: Any, written: bool
) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        w = ones(grad=True)
        with run.forward():
            h = torch.randn(SIZE, SIZE)
            loss = (w * h).sin().sum()
        if written:
            run.written()
        with torch.no_grad():
            change(h)
        loss.backward()
        return [w.grad]

    changed = same_bits(make(**settings), compute) == ["inplace"]
    assert changed == (change is not CHANGES["nothing"])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_change_inside_the_forward_before_staging_is_seen(
    make: Any, same_bits: Any, settings: dict[str, Any]
) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        w = ones(grad=True)
        with run.forward():
            y = w.exp()  # saves its result
            y.mul_(2)
        y.sum().backward()
        return [w.grad]

    assert same_bits(make(**settings), compute) == ["inplace"]


def test_a_change_is_seen_after_the_memory_is_gone(make: Any, same_bits: Any) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        w = ones(grad=True)
        with run.forward():
            h = torch.randn(SIZE, SIZE)
            loss = (w * h).sin().sum()
            with torch.no_grad():
                h.add_(1)
            del h
        run.written()
        gc.collect()
        loss.backward()
        return [w.grad]

    assert same_bits(make(), compute) == ["inplace"]


def test_a_base_changed_after_its_view_was_saved_is_seen(make: Any, same_bits: Any) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        w = ones(grad=True)
        base = torch.randn(2 * SIZE, SIZE)
        with run.forward():
            loss = (w * base[SIZE:]).sin().sum()
        base[:1].zero_()  # other bytes, one counter
        loss.backward()
        return [w.grad]

    assert same_bits(make(), compute) == ["inplace"]


@pytest.mark.parametrize("kind", ["parameter", "its transpose", "view of a frozen one"])
def test_a_changed_parameter_is_seen(make: Any, same_bits: Any, kind: str) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        p = nn.Parameter(torch.randn(SIZE, SIZE), requires_grad=kind != "view of a frozen one")
        x = torch.randn(SIZE, SIZE, requires_grad=True)
        used = {"parameter": p, "its transpose": p.t()}.get(kind, p[:, 1:])
        with run.forward():
            y = x @ used
        with torch.no_grad():
            p.mul_(2)
        y.sum().backward()
        return [x.grad]

    assert same_bits(make(), compute) == ["inplace"]


def test_parameter_data_replaced_before_the_backward_is_used(make: Any, same_bits: Any) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        p = nn.Parameter(torch.randn(SIZE, SIZE))
        x = torch.randn(SIZE, SIZE, requires_grad=True)
        with run.forward():
            y = x @ p
        p.data = torch.full((SIZE, SIZE), 3.0)  # as sharded parameters come and go
        y.sum().backward()
        return [x.grad]

    same_bits(make(), compute)


def test_a_change_between_first_and_second_backward_is_seen(make: Any, same_bits: Any) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        w = ones(grad=True)
        with run.forward():
            h = torch.randn(SIZE, SIZE)
            y = (w * h).sin().sum()
        y.backward(retain_graph=True)
        h.mul_(2)
        y.backward()
        return [w.grad]

    assert same_bits(make(), compute) == ["inplace"]


@pytest.mark.parametrize("held", [True, False], ids=["forwarded", "read back"])
def test_a_backward_that_writes_to_what_it_saved_is_seen_by_others(
    make: Any, same_bits: Any, held: bool
) -> None:
    class Overwrites(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            with torch.no_grad():
                x.zero_()
            return grad * 2

    def compute(run: Any) -> list[torch.Tensor]:
        w, v = ones(grad=True), ones(grad=True)
        keep = []
        with run.forward():
            h = w + 1
            total = h * v + Overwrites.apply(h)
            if held:
                keep.append(h)
            del h
        run.written()
        total.sum().backward()
        return [v.grad]

    assert same_bits(make(), compute) == ["inplace"]


def test_a_tensor_changed_after_create_graph_saved_it_again_is_seen(
    make: Any, same_bits: Any
) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        x = torch.randn(SIZE, SIZE, requires_grad=True)
        with run.forward():
            h = x * 1.0
            (g,) = torch.autograd.grad((h**3).sum(), h, create_graph=True)
        with torch.no_grad():
            h.mul_(2)
        g.sum().backward()
        return [x.grad]

    assert same_bits(make(), compute) == ["inplace"]


class Mark:
    """Something that can be referred to weakly."""


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_graph_lives_on_when_its_result_is_dropped(make: Any, settings: dict[str, Any]) -> None:
    act = make(**settings)
    gc.disable()  # reference counts alone have to do it
    try:
        for _ in range(3):
            w = ones(grad=True)
            with act.forward():
                y = w.exp().sigmoid().tanh()  # each saves its own result
            marks = []
            node = y.grad_fn
            while node is not None:
                mark = Mark()
                node.metadata["mark"] = mark  # dies with the node, which has no weak references
                marks.append(weakref.ref(mark))
                node = node.next_functions[0][0] if node.next_functions else None
            assert len(marks) == 4
            del y, mark
            assert [ref() for ref in marks] == [None] * 4
    finally:
        gc.enable()


def test_kept_tensors_are_held_without_their_graph() -> None:
    h = ones(grad=True).exp()
    assert Kept(h, h._version).unpack().grad_fn is None


def autocast_step(run: Any, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16), run.forward():
        loss = model(x).float().square().mean()
    run.written()
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def mlp(width: int = SIZE) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def test_autocast_weights_are_cast_again_instead_of_written(make: Any, same_bits: Any) -> None:
    act = make()
    model, x = mlp(), torch.randn(8, SIZE)
    same_bits(act, lambda run: autocast_step(run, model, x))
    assert act.stats().recast_bytes == SIZE * SIZE * 2  # the first needs no gradient for x


def test_without_recasting_the_casts_are_written(make: Any, same_bits: Any) -> None:
    act = make(recast_parameters=False)
    model, x = mlp(), torch.randn(8, SIZE, requires_grad=True)
    same_bits(act, lambda run: autocast_step(run, model, x))
    assert act.stats().recast_bytes == 0


def test_tied_and_frozen_weights_under_autocast_give_the_same_bits(
    make: Any, same_bits: Any
) -> None:
    act = make()
    model = mlp()
    model[2].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    same_bits(act, lambda run: autocast_step(run, model, torch.ones(8, SIZE)))
    model.requires_grad_(False)
    model[0].bias.requires_grad_()
    same_bits(act, lambda run: autocast_step(run, model, torch.ones(8, SIZE)))


def test_a_parameter_changed_before_the_recast_is_a_clear_error(make: Any) -> None:
    act, model = make(), mlp()
    with torch.autocast("cpu", torch.bfloat16), act.forward():
        loss = model(torch.ones(8, SIZE)).sum()
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="recast_parameters=False"):
        loss.backward()


def test_a_stale_autocast_copy_is_not_recast_from_the_new_parameter(
    make: Any, same_bits: Any
) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
        x = torch.randn(8, SIZE)
        with torch.autocast("cpu", torch.bfloat16):  # hands out the first cast in both steps
            for _ in range(2):
                optimizer.zero_grad()
                with run.forward():
                    loss = model(x).float().square().mean()
                run.written()
                loss.backward(retain_graph=True)
                optimizer.step()
        return [p.grad for p in model.parameters()]

    same_bits(make(), compute)


class OwnCast(nn.Module):
    """Casts its weight by hand and then does something to the copy, or to the weight."""

    def __init__(self, deed: str) -> None:
        super().__init__()
        self.deed = deed
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        copy = self.weight.to(torch.bfloat16)
        with torch.no_grad():
            if self.deed == "copy changed":
                copy.mul_(2)
            if self.deed == "parameter changed":
                self.weight.mul_(2)
            if self.deed == "copy changed unseen":
                copy.data.mul_(2)
            if self.deed == "parameter changed unseen":
                self.weight.data.mul_(2)
            if self.deed == "negated":
                copy = torch._neg_view(copy)
            if self.deed == "other bits":
                copy = copy.view(torch.float16).nan_to_num()
        return x.to(copy.dtype) @ copy[1:].t()


@pytest.mark.parametrize(
    "deed", ["none", "copy changed", "parameter changed", "negated", "other bits"]
)
def test_a_cast_is_recast_only_while_it_shows_its_parameter(
    make: Any, same_bits: Any, deed: str
) -> None:
    act = make()

    def compute(run: Any) -> list[torch.Tensor]:
        model = OwnCast(deed)
        x = torch.randn(8, SIZE, requires_grad=True)
        with run.forward():
            y = model(x)
        run.written()
        y.float().sum().backward()
        return [x.grad]

    same_bits(act, compute)
    assert (act.stats().recast_bytes > 0) == (deed == "none")


@pytest.mark.parametrize("deed", ["copy changed unseen", "parameter changed unseen"])
def test_a_change_that_no_version_shows_is_an_error_and_never_a_wrong_gradient(
    make: Any, deed: str
) -> None:
    act = make()
    x = torch.randn(8, SIZE, requires_grad=True)
    with act.forward():
        y = OwnCast(deed)(x)
    assert act.stats().recast_bytes > 0
    with pytest.raises(RuntimeError, match="recast_parameters=False"):
        y.float().sum().backward()


def test_a_parameter_changed_and_put_back_is_recast(make: Any) -> None:
    act = make()
    model = OwnCast("none")
    x = torch.randn(8, SIZE, requires_grad=True)
    with act.forward():
        y = model(x)
    model.weight.data.mul_(2).div_(2)
    y.float().sum().backward()
    assert x.grad is not None


def test_a_recast_view_has_the_saved_strides() -> None:
    p = nn.Parameter(torch.randn(6, 8))
    copy = p.to(torch.bfloat16)
    view = copy[1:, ::2].t()
    back = RecastParameter(view, p).unpack()
    assert torch.equal(back, view)
    assert back.stride() == view.stride()
    assert back.data_ptr() % 64 == view.data_ptr() % 64
