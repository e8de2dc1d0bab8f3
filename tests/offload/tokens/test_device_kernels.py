"""What kernels of a GPU give is what the host's give: on a GPU, and without one, emulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.device import has_gpu
from offload.device.kernels import LIBRARY
from offload.device.token_kernels import TokenKernels
from offload.native import (
    AttentionBlocks,
    ThreadPool,
    block_attention,
    block_attention_backward,
)
from offload.tokens import block_attention as attention_module
from offload.tokens import kept_rows as rows_module
from offload.tokens.block_attention import BlockAttention, positions_of
from offload.tokens.kept_rows import add_rows
from offload.tokens.selection import Kept

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITHOUT_GPU = pytest.mark.skipif(
    not has_gpu() or not LIBRARY.exists(), reason="no GPU, or no kernels built for it"
)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=WITHOUT_GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where tensors lie that kernels take: on a GPU, or on the host for those compiled for it."""
    if request.param == "cuda":
        return torch.device("cuda")
    emulated: TokenKernels = request.getfixturevalue("emulated_kernels")
    for module in (attention_module, rows_module):
        monkeypatch.setattr(module, "kernels_for", lambda *_tensors, channels=0: emulated)
    return torch.device("cpu")


@dataclass
class Case:
    """An attention of random numbers; the last block is shorter."""

    blocks: AttentionBlocks
    given: list[Tensor]
    weight: Tensor

    @property
    def options(self) -> dict[str, Any]:
        of = self.blocks
        return {"documents": of.documents, "window": of.window, "scale": of.scale}


def some_case(dtype: torch.dtype, length: int, channels: int, block: int, **more: Any) -> Case:
    generator = torch.Generator().manual_seed(length + channels)
    draw = more.get("batch", 2), more.get("key_heads", 2), more.get("group", 2)
    batch, key_heads, group = draw
    shapes = [(batch, heads, length, channels) for heads in (key_heads * group, *2 * [key_heads])]
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    count = -(-length // block)
    rows = torch.arange(count, dtype=torch.int32)[1::2] if count > 1 else torch.zeros(1).int()
    columns = torch.arange(count, dtype=torch.int32)[count % 2 :: 3] if count > 3 else rows
    blocks = AttentionBlocks(
        rows=rows.expand(batch, -1).contiguous(),
        columns=columns.expand(batch, -1).contiguous(),
        block_tokens=block,
        scale=channels**-0.5,
        documents=(torch.arange(length) // 50).int().expand(batch, -1).contiguous()
        if more.get("packed")
        else None,
        window=more.get("window", 0),
    )
    tokens = positions_of(blocks.rows, blocks, length).shape[1]
    weight = torch.randn(*shapes[0][:2], tokens, channels, generator=generator).to(dtype)
    return Case(blocks, given, weight)


def on_host(case: Case, out: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the host kernel's output, and its gradients had that been `out`."""
    pool, blocks = ThreadPool(2), case.blocks
    query, key, value = (each.float() for each in case.given)
    padded = blocks.rows.shape[1] * blocks.block_tokens
    own = query.new_zeros(*query.shape[:2], padded, query.shape[3])
    lse = query.new_zeros(own.shape[:3])
    block_attention(pool, blocks, query, key, value, own, lse)
    tokens = out.shape[2]
    given, weight = torch.zeros_like(own), torch.zeros_like(own)
    given[:, :, :tokens], weight[:, :, :tokens] = out.float(), case.weight.float()
    width = blocks.columns.shape[1] * blocks.block_tokens
    parts = (
        torch.zeros_like(own),
        *(key.new_zeros(*key.shape[:2], width, key.shape[3]) for _ in range(2)),
    )
    forward = (query, key, value, given, lse)
    block_attention_backward(pool, blocks, forward, weight, (parts[0], parts[1], parts[2]))
    wholes = []
    listed = (blocks.rows, blocks.columns, blocks.columns)
    for part, each, like in zip(parts, listed, (query, key, value), strict=True):
        at = positions_of(each, blocks, query.shape[2])
        whole = torch.zeros_like(like)
        for one, of, where in zip(whole, part, at, strict=True):
            one[:, where] = of[:, : len(where)]
        wholes.append(whole)
    return own[:, :, :tokens], wholes


def bound(case: Case) -> float:
    """Return by how much sums in fp32 in another order may be off, of values of about 1.

    A score is a sum over channels, off by as many roundings of what its terms are together at most;
    a weight is off by twice as much, of itself, and sums of those by as many roundings as columns.
    """
    query, key, _ = case.given
    channels, columns = query.shape[-1], case.blocks.columns.shape[1] * case.blocks.block_tokens
    norms = [each.float().norm(dim=-1).max().item() for each in (query, key)]
    score = channels * norms[0] * norms[1] * case.blocks.scale
    return 2.0**-24 * (2 * score + columns)


def close(found: Tensor, expected: Tensor, off: float) -> None:
    """Hold them together: `off` of what is largest, and a rounding to the type that is stored."""
    eps = torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 0.0
    largest = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.float().cpu(), expected, atol=off * largest, rtol=eps + 1e-6)


def run(case: Case, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Return what a model would get, and gradients."""
    given = [
        each.transpose(1, 2).contiguous().to(device).transpose(1, 2).requires_grad_()
        for each in case.given
    ]
    attention = BlockAttention(case.blocks.block_tokens)
    assert attention.path(given[0], given[1], given[2]) == "cuda"
    blocks = case.blocks
    out = attention(*given, blocks.rows.to(device), blocks.columns, **case.options)
    grads = torch.autograd.grad(out, given, case.weight.to(device))
    return out.detach(), list(grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "channels", "block", "more"),
    [
        (150, 40, 16, {"packed": True}),
        (97, 72, 32, {"window": 40}),
        (70, 256, 128, {"key_heads": 1, "group": 3}),
        (5, 3, 1, {"packed": True, "window": 2}),
    ],
)
def test_attention_and_its_gradients_are_the_hosts(
    device: torch.device,
    dtype: torch.dtype,
    length: int,
    channels: int,
    block: int,
    more: dict[str, Any],
) -> None:
    case = some_case(dtype, length, channels, block, **more)
    found, grads = run(case, device)
    assert found.dtype == dtype
    expected, wholes = on_host(case, found.cpu())
    close(found, expected, bound(case))
    for each, whole in zip(grads, wholes, strict=True):
        # Of a score a gradient takes what it weighs by, whose terms are sums over channels too.
        close(each, whole, 4 * bound(case))


@WITHOUT_GPU
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_are_the_hosts_on_a_gpu(dtype: torch.dtype) -> None:
    case = some_case(dtype, 4000, 128, 64, batch=1, key_heads=2, group=4)
    found, grads = run(case, torch.device("cuda"))
    expected, wholes = on_host(case, found.cpu())
    close(found, expected, bound(case))
    for each, whole in zip(grads, wholes, strict=True):
        close(each, whole, 4 * bound(case))
    again, more = run(case, torch.device("cuda"))
    assert all(map(torch.equal, (found, *grads), (again, *more)))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("block", [8, 24, 128])
def test_scores_of_blocks_are_the_hosts(
    device: torch.device, ahead: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = some_case(torch.float32, 150, 20, block)
    query, key, _ = case.given
    documents = (torch.arange(150) // 60).expand(2, -1)
    attention, more = BlockAttention(block), {"ahead": ahead, "documents": documents}
    found = attention.pair_scores(query.to(device), key.to(device), **more)
    assert found.device.type == "cpu"
    monkeypatch.setattr(attention_module, "kernels_for", lambda *_tensors, channels=0: None)
    expected = attention.pair_scores(query, key, **more)
    assert torch.equal(found < 0, expected < 0)
    close(found, expected, bound(case))


@pytest.fixture
def on_hosts_way(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to have tensors go PyTorch's way from then on."""
    return lambda: monkeypatch.setattr(
        rows_module, "kernels_for", lambda *_tensors, channels=0: None
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_added_as_pytorch_adds_them(
    device: torch.device, dtype: torch.dtype, on_hosts_way: Callable[[], None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.tensor([0, 3, 6]), torch.tensor([5])]
    parts = [torch.randn(1, len(at), 33, generator=generator).to(dtype) for at in rows]
    residual = torch.randn(2, 7, 33, generator=generator).to(dtype)
    residual[0, 1] = -0.0  # which a sum with zero is not
    weight = torch.randn(residual.shape, generator=generator).to(dtype)

    def added(on: torch.device) -> list[Tensor]:
        own = [each.to(on).requires_grad_() for each in (residual, *parts)]
        out = add_rows(own[0], own[1:], Kept(tuple(at.to(on) for at in rows), 7, ((), ())))
        found = [out.detach(), *torch.autograd.grad(out, own, weight.to(on))]
        return [each.cpu() for each in found]

    ours = added(device)
    on_hosts_way()
    for one, other in zip(ours, added(torch.device("cpu")), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.signbit(), other.signbit())


def test_rows_are_added_in_place_and_seen_to_be(emulated_kernels: TokenKernels) -> None:
    residual, part = torch.ones(4, 3), torch.full((2, 3), 0.5)
    version = residual._version
    emulated_kernels.add_rows(residual, part, torch.tensor([1, 3]), residual)
    assert residual[:, 0].tolist() == [1.0, 1.5, 1.0, 1.5]
    assert residual._version > version
