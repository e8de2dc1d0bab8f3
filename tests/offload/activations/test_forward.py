"""One forward: what goes, what stays and why, when it is copied, and in which order it returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SIZE = 64
NBYTES = SIZE * SIZE * 4


class Tagged(torch.Tensor):
    """A subclass of no behaviour of its own."""


class _Scale(torch.autograd.Function):
    """Saves any kind of tensor and multiplies by its number of elements."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(other)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (other,) = ctx.saved_tensors
        whole = other.is_quantized or other.is_sparse
        weight = other.dequantize().to_dense().sum() if whole else other.numel()
        return grad * weight, None


def square() -> torch.Tensor:
    return torch.randn(SIZE, SIZE)


STAYS = {
    "sparse": lambda: square().relu().to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.quint8),
    "subclass": lambda: square().as_subclass(Tagged),
    "device": lambda: torch.ones(4, device="meta"),
    "parameter": lambda: nn.Parameter(square()),
}


@pytest.mark.parametrize("reason", STAYS)
def test_what_cannot_be_restored_exactly_passes_through(
    make: Any, same_bits: Any, reason: str
) -> None:
    act = make()

    def compute(run: Any) -> list[torch.Tensor]:
        x = torch.ones(4, requires_grad=True)
        with run.forward():
            y = _Scale.apply(x, STAYS[reason]())
        y.sum().backward()
        return [x.grad]

    same_bits(act, compute)
    stats = act.stats()
    assert set(stats.passed_through_bytes) == {reason}
    assert stats.offloaded_bytes == 0


def test_a_nested_tensor_passes_through(make: Any, same_bits: Any) -> None:
    act = make()

    def compute(run: Any) -> list[torch.Tensor]:
        nested = torch.nested.nested_tensor(
            [torch.randn(2, 4), torch.randn(3, 4)], requires_grad=True
        )
        with run.forward():
            y = torch.nested.to_padded_tensor(nested * nested, 0.0)
        y.sum().backward()
        return list(nested.grad.unbind())

    same_bits(act, compute)
    assert set(act.stats().passed_through_bytes) == {"nested"}


def test_a_distributed_tensor_passes_through(make: Any, tmp_path_factory: Any) -> None:
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    meet = tmp_path_factory.mktemp("gloo") / "meet"
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{meet}")
    try:
        mesh = init_device_mesh("cpu", (1,))
        act = make()
        x = distribute_tensor(square(), mesh, [Replicate()]).requires_grad_()
        with act.forward():
            y = (x * 2).sin()
        y.sum().backward()
        assert torch.equal(x.grad.to_local(), 2 * torch.cos(2 * x.detach().to_local()))
        assert act.stats().offloaded_bytes == 0
        assert act.stats().passed_through_bytes["subclass"] > 0
    finally:
        dist.destroy_process_group()


def test_buffers_and_their_views_pass_through(make: Any, same_bits: Any) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(SIZE, SIZE))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.mask + x * self.mask.t()[1:2]

    act, model = make(), Masked()

    def compute(run: Any) -> list[torch.Tensor]:
        x = torch.ones(SIZE, SIZE, requires_grad=True)
        with run.forward():
            y = model(x)
        y.sum().backward()
        return [x.grad]

    same_bits(act, compute)
    assert act.stats().passed_through_bytes == {"buffer": NBYTES + SIZE * 4}


def test_batch_norm_may_update_its_buffers_while_it_runs(make: Any, same_bits: Any) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        norm = nn.BatchNorm1d(SIZE)
        x = torch.randn(32, SIZE, requires_grad=True)
        with run.forward():
            y = norm(norm(x).sin())
        run.written()
        y.square().sum().backward()
        return [x.grad, norm.weight.grad, norm.running_mean]

    same_bits(make(), compute)


def test_a_storage_emptied_before_it_is_saved_passes_through(make: Any, same_bits: Any) -> None:
    act = make()

    def compute(run: Any) -> list[torch.Tensor]:
        x = torch.ones(4, requires_grad=True)
        emptied = square()
        emptied.untyped_storage().resize_(0)
        with run.forward():
            y = _Scale.apply(x, emptied)
        y.sum().backward()
        return [x.grad]

    same_bits(act, compute)
    assert set(act.stats().passed_through_bytes) == {"emptied"}


@pytest.mark.parametrize("when", ["before staging", "after staging"])
def test_a_storage_emptied_and_filled_again_shows_what_is_there(
    make: Any, same_bits: Any, when: str
) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        w = torch.ones(SIZE, SIZE, requires_grad=True)
        h = square()
        again = h.clone()
        with run.forward():
            y = w * h
            if when == "before staging":
                h.untyped_storage().resize_(0)
            z = y.sin()
        h.untyped_storage().resize_(0)
        h.untyped_storage().resize_(NBYTES)
        h.data.copy_(again)
        z.sum().backward()
        return [w.grad]

    same_bits(make(), compute)


def test_a_storage_emptied_before_staging_and_left_so_is_an_error(make: Any) -> None:
    act = make()
    w = torch.ones(SIZE, SIZE, requires_grad=True)
    with act.forward():
        h = square()
        y = w * h
        h.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="emptied"):
        y.sum().backward()


def test_tensors_below_the_minimum_stay(make: Any) -> None:
    act = make(min_tensor_bytes=NBYTES)
    w = torch.ones(SIZE, SIZE, requires_grad=True)
    with act.forward():
        ((w * square())[1:] * square()[1:]).sum()
    assert act.stats().offloaded_bytes == NBYTES
    assert act.stats().passed_through_bytes == {"small": NBYTES - SIZE * 4}


class _WritesWhatItSaved(torch.autograd.Function):
    """Changes a saved tensor's bytes after saving, unseen by its counter, as some kernels do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(noise)
        noise.data.copy_(torch.arange(noise.numel()).view_as(noise))
        return x * noise

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.saved_tensors[0], None


LATE: dict[str, Any] = {
    "rrelu": lambda x: F.rrelu(x, 0.1, 0.9, training=True),
    "own function": lambda x: _WritesWhatItSaved.apply(x, torch.empty(SIZE, SIZE)),
    "dropout": lambda x: F.dropout(x, 0.5),
    "feature dropout": lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
    "gru": lambda x: torch.gru_cell(
        x, x.detach(), torch.ones(3 * SIZE, SIZE), torch.ones(3 * SIZE, SIZE)
    ),
    "cumulative maximum": lambda x: torch.cummax(x, 0).values,
    "max pool": lambda x: F.max_pool2d(x[None, None], 2),
    "multi-margin": lambda x: F.multi_margin_loss(x, torch.arange(SIZE)),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 4, SIZE // 4, SIZE)] * 3),
    "layer norm": lambda x: F.layer_norm(x, (SIZE,)),
    "cross entropy": lambda x: F.cross_entropy(x, torch.arange(SIZE)),
    "in place after": lambda x: F.relu(x + 1, inplace=True),
    "in place on a view": lambda x: (x * 1)[1:].mul_(2).exp_(),
    "in place chain": lambda x: (x * 1).sigmoid_().add_(1),
}


@pytest.mark.parametrize("name", LATE)
def test_an_operator_may_write_what_it_saved_until_it_ends(
    make: Any, same_bits: Any, name: str
) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        x = torch.randn(SIZE, SIZE, requires_grad=True)
        with run.forward():
            y = LATE[name](LATE[name](x * 1) * 1 if name == "rrelu" else x * 1)
            loss = y.sin().sum()
            del y
        run.written()
        loss.backward()
        return [x.grad]

    same_bits(make(), compute)


def chain(run: Any, weights: list[torch.Tensor]) -> torch.Tensor:
    with run.forward():
        y = torch.ones(SIZE, SIZE)
        for weight in weights:
            y = (y * weight).sin()
        return y.sum()


def leaves(count: int) -> list[torch.Tensor]:
    return [torch.randn(SIZE, SIZE, requires_grad=True) for _ in range(count)]


def test_the_second_step_reads_in_the_order_of_the_first(make: Any) -> None:
    act = make(read_ahead_bytes=2 * NBYTES)

    class _Both(torch.autograd.Function):
        """Saves several tensors and uses them first to last, where autograd would not."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                ctx.inner = x.detach().requires_grad_()
                ctx.parts = [(ctx.inner * square()).sum() for _ in range(6)]
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return sum(torch.autograd.grad(part, ctx.inner)[0] for part in ctx.parts) * grad

    orders = []
    for _ in range(2):
        w = torch.ones(SIZE, SIZE, requires_grad=True)
        step = act.forward()
        with step:
            y = _Both.apply(w)
        act.transfers.drain()
        orders.append(list(step.backward.order))
        y.sum().backward()
        del y
    assert orders == [[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert act.stats().reloaded_bytes == act.stats().offloaded_bytes == 12 * NBYTES


@pytest.mark.parametrize("read_ahead", [0, 1, NBYTES, 3 * NBYTES, None])
def test_any_read_ahead_gives_the_same_bits(
    make: Any, same_bits: Any, read_ahead: int | None
) -> None:
    act = make(read_ahead_bytes=read_ahead)

    def compute(run: Any) -> list[torch.Tensor]:
        weights = leaves(12)
        loss = chain(run, weights)
        run.written()
        loss.backward()
        return [weight.grad for weight in weights]

    for _ in range(3):
        same_bits(act, compute)
    assert act.stats().reloaded_bytes > 0
    assert act.transfers.ahead_bytes == 0


def test_a_lazy_module_with_buffers_meets_its_first_batch(make: Any) -> None:
    act = make()
    model = nn.LazyBatchNorm1d()
    with act.forward():
        loss = model(square()).sum()
    loss.backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize("way", [torch.Tensor.detach, lambda p: p.data, lambda p: p.detach()[1:]])
def test_a_plain_tensor_over_a_parameter_stays(make: Any, way: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(square())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[: len(way(self.weight))] * way(self.weight)

    act = make()
    x = square().requires_grad_()
    with act.forward():
        loss = Model()(x).sum()
    loss.backward()
    stats = act.stats()
    assert stats.offloaded_bytes == 0
    assert stats.passed_through_bytes["parameter"] > 0


def reads_in_order(act: Any, weights: list[torch.Tensor], held: torch.Tensor) -> list[int]:
    """Run a step in which every operator also saves `held`; return where the cursor went."""
    step = act.forward()
    places = []
    with step:
        y = square()
        for weight in weights:
            y = (y * weight) * held
        loss = y.sum()
    want = step.backward.want

    def noted(region: Any, again: bool, recording: Any) -> None:
        want(region, again, recording)
        places.append(step.backward.read_at)

    step.backward.want = noted
    loss.backward()
    return places


def test_a_tensor_that_many_operators_saved_does_not_move_the_reading_ahead(make: Any) -> None:
    act = make()
    weights = [square().requires_grad_() for _ in range(6)]
    places = reads_in_order(act, weights, square().sin())
    assert places == sorted(places)
    assert places[0] <= 2  # wanted first, so expected first: not by its first save, which was early


def test_a_branch_without_a_backward_does_not_hide_the_order_of_the_rest(make: Any) -> None:
    act = make()
    weights = [square().requires_grad_() for _ in range(4)]
    step = act.forward()
    with step:
        ys = [square() * weight for weight in weights]
        unused = (square() * weights[0]).sin()
    signature = step.signature
    for number in (1, 3, 0, 2):  # in an order of its own
        ys[number].sum().backward()
    del ys, unused
    learned = act.book.order_of(signature)
    assert learned is not None
    assert learned[:4] == [1, 3, 0, 2]
    assert sorted(learned) == list(range(len(signature)))
