"""Rows stand for a tensor with zeros elsewhere, whatever is asked of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from offload.tokens.kept_rows import KeptRows, add_rows, take_rows
from offload.tokens.selection import Kept

TOKENS, CHANNELS = 12, 5


def some() -> tuple[KeptRows, Tensor]:
    """Return rows of a batch of two, and the whole tensor that they stand for."""
    kept = Kept(torch.tensor([[0, 1, 6], [2, 3, 11]]), TOKENS, ())
    rows = torch.randn(2, 3, CHANNELS, requires_grad=True)
    whole = torch.zeros(2, TOKENS, CHANNELS)
    for one, part, at in zip(whole, rows.detach(), kept.rows, strict=True):
        one[at] = part
    return KeptRows(rows, kept), whole


def test_a_residual_gets_rows_where_they_stand_and_is_else_as_it_was() -> None:
    part, whole = some()
    residual = torch.randn(2, TOKENS, CHANNELS, requires_grad=True)
    for found in (residual + part, part + residual, torch.add(residual, part)):
        assert torch.equal(found, residual + whole)
        gone = (whole == 0).all(-1)
        assert torch.equal(found[gone], residual[gone])
    weight = torch.randn(2, TOKENS, CHANNELS)
    of_residual, of_rows = torch.autograd.grad(
        (residual + part) * weight, [residual, part.rows], torch.ones_like(weight)
    )
    assert torch.equal(of_residual, weight)
    assert torch.equal(
        of_rows, torch.stack([one[at] for one, at in zip(weight, part.kept.rows, strict=True)])
    )


def test_taking_rows_gives_their_gradients_back_to_their_places() -> None:
    part, _ = some()
    x = torch.randn(2, TOKENS, CHANNELS, dtype=torch.float64, requires_grad=True)
    rows = part.rows.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda one: take_rows(one, part.kept), (x,))
    assert torch.autograd.gradcheck(lambda one, two: add_rows(one, two, part.kept), (x, rows))


def test_scaling_and_dropout_stay_with_the_rows() -> None:
    part, whole = some()
    scaled = part * 0.5
    assert isinstance(scaled, KeptRows)
    assert torch.equal(scaled.padded(), whole * 0.5)
    dropped = F.dropout(part, 0.5, training=True)
    assert isinstance(dropped, KeptRows)
    assert dropped.rows.shape == part.rows.shape
    assert torch.equal(torch.nn.Dropout(0.0)(part).padded(), whole)


def test_anything_else_sees_the_whole_tensor() -> None:
    part, whole = some()
    norm = torch.nn.LayerNorm(CHANNELS)
    assert torch.equal(norm(part), norm(whole))
    assert torch.equal(torch.cat([part, whole]), torch.cat([whole, whole]))
    assert torch.equal(part.sum(-1), whole.sum(-1))
    assert part.shape == whole.shape
    assert torch.equal(part * whole, whole * whole)
    other, its_whole = some()
    assert (
        torch.equal(part + other, whole + its_whole) if isinstance(part + other, Tensor) else True
    )


def test_what_is_changed_in_place_is_changed_where_it_lies() -> None:
    part, whole = some()
    x = torch.randn(2, TOKENS, CHANNELS)
    expected = x + whole
    with torch.no_grad():
        x.add_(part)
    assert torch.equal(x, expected)


def test_other_types_of_numbers_are_added_as_pytorch_does() -> None:
    part, whole = some()
    x = torch.randn(2, TOKENS, CHANNELS, dtype=torch.bfloat16)
    assert torch.equal(x + part, x + whole)
