"""`ActivationOffload` trains to the same bits, however its forwards and backwards are combined."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SIZE = 64
NBYTES = SIZE * SIZE * 4
KIB = 1024


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), 0.1)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Gpt(nn.Module):
    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.blocks(self.embed(tokens))
        return F.cross_entropy((y @ self.embed.weight.t()).flatten(0, 1), tokens.flatten())


def leaves(count: int) -> list[torch.Tensor]:
    return [torch.randn(SIZE, SIZE, requires_grad=True) for _ in range(count)]


def chain(run: Any, weights: list[torch.Tensor]) -> torch.Tensor:
    with run.forward():
        y = torch.ones(SIZE, SIZE)
        for weight in weights:
            y = (y * weight).sin()
        return y.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("waiting", [True, False], ids=["read back", "as it comes"])
def test_a_gpt_trains_to_the_same_bits(
    make: Any, same_bits: Any, engine: str, dtype: torch.dtype, waiting: bool
) -> None:
    act = make(io_engine=engine)

    def train(run: Any) -> list[torch.Tensor]:
        model = Gpt()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(3):
            for _ in range(2):  # accumulated
                tokens = torch.randint(0, 50, (2, 16))
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), run.forward():
                    loss = model(tokens) / 2
                if waiting:
                    run.written()
                loss.backward()
                losses.append(loss.detach())
            gradients = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        return [*losses, *gradients, *model.parameters()]

    same_bits(act, train)
    stats = act.stats()
    assert stats.io_engine == engine
    assert stats.offloaded_bytes > 0
    assert stats.kept_bytes == 0
    assert (stats.recast_bytes > 0) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("waiting", [True, False])
def test_a_retained_graph_runs_again(make: Any, same_bits: Any, times: int, waiting: bool) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        weights = leaves(6)
        loss = chain(run, weights)
        for turn in range(times):
            if waiting:
                run.written()
            loss.backward(retain_graph=turn < times - 1)
        return [weight.grad for weight in weights]

    act = make(staging_bytes=8 * NBYTES)
    same_bits(act, compute)
    act.transfers.drain()
    assert act.stats().spill_bytes == 0


def test_a_backward_twice_without_retaining_is_pytorchs_error(make: Any, same_bits: Any) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        loss = chain(run, leaves(2))
        loss.backward()
        loss.backward()
        return []

    assert "second time" in same_bits(make(), compute)[0]


@pytest.mark.parametrize("inside", [True, False], ids=["grad inside", "grad outside"])
def test_double_backward_gives_the_same_bits(make: Any, same_bits: Any, inside: bool) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        model = nn.Sequential(
            nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE), nn.Softplus()
        )
        x = torch.randn(8, SIZE, requires_grad=True)
        with run.forward():
            y = model(x).square().sum()
            if inside:
                (g,) = torch.autograd.grad(y, x, create_graph=True)
        run.written()
        if not inside:
            (g,) = torch.autograd.grad(y, x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        (y + g.square().sum() + h.sum()).backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    same_bits(make(), compute)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("waiting", [True, False])
def test_forwards_may_wait_and_run_backward_in_any_order(
    make: Any, same_bits: Any, order: tuple[int, ...], waiting: bool
) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        weights = leaves(5)
        losses: list[Any] = [chain(run, weights) for _ in range(3)]
        if waiting:
            run.written()
        for index in order:
            losses[index].backward()
            losses[index] = None
        return [weight.grad for weight in weights]

    act = make(staging_bytes=6 * NBYTES)
    for _ in range(2):
        same_bits(act, compute)


def test_interleaved_micro_batches_give_the_same_bits(make: Any, same_bits: Any) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        weights = leaves(4)
        pending: list[torch.Tensor] = []
        for _ in range(8):  # one forward, one backward, with two always under way
            pending.append(chain(run, weights))
            if len(pending) > 2:
                pending.pop(0).backward()
        for loss in pending:
            loss.backward()
        return [weight.grad for weight in weights]

    same_bits(make(), compute)


def test_open_forwards_may_nest(make: Any, same_bits: Any) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        w = torch.randn(SIZE, SIZE, requires_grad=True)
        with run.forward():
            y = (w * w.detach().clone()).sin()
            with run.forward():
                y = y.exp() * y
            y = y.sigmoid()
        run.written()
        y.sum().backward()
        return [w.grad]

    same_bits(make(), compute)


def test_a_part_of_the_graph_may_run_backward_alone(make: Any, same_bits: Any) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        weights = leaves(4)
        with run.forward():
            middle = (weights[0] * square(1)).sin() * weights[1]
            loss = ((middle * weights[2]).sin() * weights[3]).sum()
        run.written()
        first = torch.autograd.grad(loss, [weights[3]], retain_graph=True)
        second = torch.autograd.grad(loss, [middle], retain_graph=True)
        third = torch.autograd.grad(loss, weights)
        return [*first, *second, *third]

    same_bits(make(), compute)


def square(seed: int) -> torch.Tensor:
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_graphs_dropped_without_a_backward_leave_nothing(make: Any) -> None:
    act = make(staging_bytes=512 * KIB, spill_bytes=64 << 20)
    big = torch.randn(512, 512, requires_grad=True)

    def forward_only() -> None:
        with act.forward():
            y = big
            for _ in range(8):
                y = (y * 1.5).sin()

    forward_only()
    act.transfers.drain()
    before = resident_bytes()
    gc.disable()
    try:
        for _ in range(20):
            forward_only()
    finally:
        gc.enable()
    act.transfers.drain()
    stats = act.stats()
    assert stats.offloaded_bytes > 100 << 20
    assert stats.spill_bytes == 0
    assert act._stores.counters()["used_bytes"] == 0
    assert act._stores.counters()["outside_bytes"] == 0
    assert act.forwards == set()
    # 20 graphs would be 160 MiB; the allocator's own slack is some.
    assert resident_bytes() - before < 24 << 20


def test_a_graph_in_a_cycle_is_freed_by_the_collector(make: Any) -> None:
    act = make()
    for _ in range(20):
        w = torch.ones(SIZE, SIZE, requires_grad=True)
        with act.forward():
            y = (w * 2).sin().exp()
        holder: dict[str, Any] = {"graph": y}
        holder["self"] = holder
    del holder, y
    gc.collect()
    act.transfers.drain()
    assert act.stats().spill_bytes == 0


def test_a_collection_at_any_moment_does_no_harm(make: Any, same_bits: Any) -> None:
    act = make()

    def compute(run: Any) -> list[torch.Tensor]:
        weights = leaves(8)
        for _ in range(3):
            abandoned: list[Any] = [chain(run, weights)]
            abandoned.append(abandoned)  # freed by the collector, inside any method
            loss = chain(run, weights)
            loss.backward()
        return [weight.grad for weight in weights]

    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        same_bits(act, compute)
    finally:
        gc.set_threshold(*thresholds)


def test_a_backward_may_run_in_another_thread(make: Any, same_bits: Any) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        weights = leaves(5)
        loss = chain(run, weights)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        chain(run, weights)  # a forward at the same time, dropped
        thread.join()
        return [weight.grad for weight in weights]

    same_bits(make(staging_bytes=3 * NBYTES), compute)


def test_threads_may_each_train(make: Any, same_bits: Any) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        groups = [leaves(4) for _ in range(4)]

        def train(weights: list[torch.Tensor]) -> None:
            for _ in range(5):
                chain(run, weights).backward()

        threads = [threading.Thread(target=train, args=(group,)) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [weight.grad for group in groups for weight in group]

    act = make(staging_bytes=6 * NBYTES)
    same_bits(act, compute)
    act.transfers.drain()
    assert act.stats().spill_bytes == 0


def test_two_instances_share_a_graph_and_a_directory(make: Any, same_bits: Any) -> None:
    first, second = make(), make(io_engine="posix")

    def compute(run: Any) -> list[torch.Tensor]:
        w = torch.randn(SIZE, SIZE, requires_grad=True)
        with run.forward():
            y = (w * 2).sin()
        other = type(run)(second if run.act else None)
        with other.forward():
            y = y.exp() * y
        y.sum().backward()
        return [w.grad]

    same_bits(first, compute)
    assert first.stats().offloaded_bytes > 0
    assert second.stats().offloaded_bytes > 0


@pytest.mark.parametrize("staging", [4096, 5000, 3 * 4096, NBYTES, NBYTES + 1, 3 * NBYTES])
def test_a_small_arena_gives_the_same_bits(
    make: Any, same_bits: Any, engine: str, staging: int
) -> None:
    act = make(staging_bytes=staging, io_engine=engine)

    def compute(run: Any) -> list[torch.Tensor]:
        weights = leaves(6)
        loss = chain(run, weights)
        loss.backward(retain_graph=True)
        run.written()
        loss.backward()
        return [weight.grad for weight in weights]

    same_bits(act, compute)
    assert act.stats().staging_peak_bytes <= (staging + 4095) // 4096 * 4096


def test_two_directories_share_the_writes(make: Any, same_bits: Any, spill_dir: Path) -> None:
    folders = [spill_dir / "a", spill_dir / "b"]
    for folder in folders:
        folder.mkdir()
    act = make(path=[str(folders[0]), folders[1]])

    def compute(run: Any) -> list[torch.Tensor]:
        weights = leaves(6)
        loss = chain(run, weights)
        run.written()
        loss.backward()
        return [weight.grad for weight in weights]

    same_bits(act, compute)
    written = [spill.stats()["write_bytes"] for spill in act._stores.ssd._spills]
    assert min(written) > 0
    act.close()
    for folder in folders:
        folder.rmdir()  # which is empty
