"""A loss in segments: the whole one's value and gradients, and nothing of its logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from examples.memory import StepMemory
from offload.tokens import segment_tokens_for, segmented_cross_entropy

EPSILON = 2**-23


def made(rows: int, channels: int, classes: int, *, bias: bool = True) -> tuple[Tensor, nn.Linear]:
    """Return hidden states and a head, both trained."""
    torch.manual_seed(rows)
    return torch.randn(rows, channels, requires_grad=True), nn.Linear(channels, classes, bias=bias)


def gradients(loss: Tensor, hidden: Tensor, head: nn.Linear) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *head.parameters()]))


@given(
    rows=st.integers(1, 70),
    segment=st.integers(1, 80),
    ignored=st.floats(0, 0.9),
    count=st.sampled_from([None, 7, torch.tensor(11)]),
)
def test_loss_and_gradients_are_the_whole_ones(
    rows: int, segment: int, ignored: float, count: int | Tensor | None
) -> None:
    hidden, head = made(rows, 8, 13)
    targets = torch.randint(13, (rows,))
    targets[1:][torch.rand(rows - 1) < ignored] = -100
    ours = segmented_cross_entropy(
        hidden, head, targets, params=[*head.parameters()], segment_tokens=segment, count=count
    )
    logits = head(hidden)
    if count is None:
        whole = F.cross_entropy(logits, targets)
    else:
        whole = F.cross_entropy(logits, targets, reduction="sum") / count
    # A sum of n terms in another order differs by at most n roundings of its size.
    bound = 4 * rows * EPSILON
    assert float(ours) == pytest.approx(float(whole), rel=bound)
    pairs = zip(gradients(ours, hidden, head), gradients(whole, hidden, head), strict=True)
    for found, expected in pairs:
        assert (found - expected).abs().max() <= bound * expected.abs().max() + 1e-12


def test_gradients_of_hidden_states_are_the_whole_ones_to_the_bit_in_one_segment() -> None:
    hidden, head = made(64, 16, 32, bias=False)
    targets = torch.randint(32, (64,))
    head.requires_grad_(requires_grad=False)
    ours = segmented_cross_entropy(hidden, head, targets, segment_tokens=64)
    whole = F.cross_entropy(head(hidden), targets)
    assert torch.equal(torch.autograd.grad(ours, hidden)[0], torch.autograd.grad(whole, hidden)[0])


def test_what_comes_from_above_scales_gradients() -> None:
    hidden, head = made(20, 8, 13)
    targets = torch.randint(13, (20,))
    params = [*head.parameters()]

    def loss() -> Tensor:
        return segmented_cross_entropy(hidden, head, targets, params=params, segment_tokens=6)

    once, fourfold = (gradients(factor * loss(), hidden, head) for factor in (1, 4))
    for one, four in zip(once, fourfold, strict=True):
        assert torch.equal(4 * one, four)


def test_logits_are_never_there_as_a_whole() -> None:
    hidden, head = made(4096, 16, 1024, bias=False)
    targets = torch.randint(1024, (4096,))
    head.requires_grad_(requires_grad=False)
    logits_bytes = 4 * 4096 * 1024
    with StepMemory() as memory:
        segmented_cross_entropy(hidden, head, targets, segment_tokens=256).backward()
    assert memory.peak_bytes < logits_bytes / 2
    with StepMemory() as memory:
        F.cross_entropy(head(hidden), targets).backward()
    assert memory.peak_bytes > logits_bytes


def test_nothing_of_a_segment_is_shown_to_hooks_of_saved_tensors() -> None:
    hidden, head = made(64, 8, 512)
    targets = torch.randint(512, (64,))
    seen: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = segmented_cross_entropy(
            hidden, head, targets, params=[*head.parameters()], segment_tokens=16
        )
    loss.backward()
    assert seen == [(64, 8), (512, 8), (512,)]  # the gradients


def test_a_loss_of_no_token_is_not_a_number_as_pytorchs() -> None:
    hidden, head = made(5, 8, 13)
    targets = torch.full((5,), -100)
    assert math.isnan(F.cross_entropy(head(hidden), targets))
    loss = segmented_cross_entropy(hidden, head, targets)
    assert math.isnan(loss)
    assert float(segmented_cross_entropy(hidden, head, targets, count=3)) == 0.0


def test_targets_of_another_shape_are_refused() -> None:
    hidden, head = made(5, 8, 13)
    with pytest.raises(ValueError, match=r"\(4,\).*\(5, 8\)"):
        segmented_cross_entropy(hidden, head, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="segment_tokens=0"):
        segmented_cross_entropy(hidden, head, torch.zeros(5, dtype=torch.long), segment_tokens=0)


def test_a_segment_has_16_mib_of_logits() -> None:
    assert segment_tokens_for(32_000) == 128
    assert segment_tokens_for(128_256) == 64
    assert segment_tokens_for(10**9) == 64
    assert segment_tokens_for(16) == 8192
