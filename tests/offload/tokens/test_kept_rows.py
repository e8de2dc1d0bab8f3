"""Rows stand for a tensor with zeros elsewhere, whatever is asked of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from offload.tokens.kept_rows import KeptRows, add_rows, take_rows
from offload.tokens.selection import Kept

TOKENS, CHANNELS = 12, 5


def some() -> tuple[KeptRows, Tensor]:
    """Return rows of a batch of two, and the whole tensor that they stand for."""
    kept = Kept((torch.tensor([0, 1, 6, 7]), torch.tensor([2, 3, 11])), TOKENS, ())
    parts = [torch.randn(1, len(at), CHANNELS, requires_grad=True) for at in kept.rows]
    whole = torch.zeros(2, TOKENS, CHANNELS)
    for one, part, at in zip(whole, parts, kept.rows, strict=True):
        one[at] = part[0].detach()
    return KeptRows(parts, kept), whole


def test_a_residual_gets_rows_where_they_stand_and_is_else_as_it_was() -> None:
    part, whole = some()
    residual = torch.randn(2, TOKENS, CHANNELS, requires_grad=True)
    for found in (residual + part, part + residual, torch.add(residual, part)):
        assert torch.equal(found, residual + whole)
        gone = (whole == 0).all(-1)
        assert torch.equal(found[gone], residual[gone])
    weight = torch.randn(2, TOKENS, CHANNELS)
    inputs = [residual, *part.parts]
    found = torch.autograd.grad((residual + part) * weight, inputs, torch.ones_like(weight))
    assert torch.equal(found[0], weight)
    for one, own, at in zip(weight, found[1:], part.kept.rows, strict=True):
        assert torch.equal(own[0], one[at])


def test_taking_rows_gives_their_gradients_back_to_their_places() -> None:
    part, _ = some()
    x = torch.randn(2, TOKENS, CHANNELS, dtype=torch.float64, requires_grad=True)
    parts = [each.detach().double().requires_grad_() for each in part.parts]
    rows = part.kept.rows[0]
    assert torch.autograd.gradcheck(lambda one: take_rows(one[:1], rows), (x,))
    assert torch.autograd.gradcheck(lambda one, *own: add_rows(one, own, part.kept), (x, *parts))


def test_scaling_and_dropout_stay_with_the_rows() -> None:
    part, whole = some()
    scaled = part * 0.5
    assert isinstance(scaled, KeptRows)
    assert torch.equal(scaled.padded(), whole * 0.5)
    dropped = F.dropout(part, 0.5, training=True)
    assert isinstance(dropped, KeptRows)
    assert [each.shape for each in dropped.parts] == [each.shape for each in part.parts]
    assert torch.equal((part / 4).padded(), whole / 4)
    assert torch.equal((-part).padded(), -whole)
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
    assert torch.equal(part + other, whole + its_whole)
    assert torch.equal(part - other, whole - its_whole)
    assert torch.equal(whole - part, whole - whole)
    assert torch.equal((part + part).padded(), whole + whole)


def test_what_is_changed_in_place_is_changed_where_it_lies() -> None:
    part, whole = some()
    x = torch.randn(2, TOKENS, CHANNELS)
    expected = x + whole
    with torch.no_grad():
        x.add_(part)
    assert torch.equal(x, expected)


def test_a_change_of_it_in_place_would_be_lost_and_is_refused() -> None:
    part, _ = some()
    with pytest.raises(TypeError, match="mul_"):
        part.mul_(2.0)


def test_other_types_of_numbers_are_added_as_pytorch_does() -> None:
    part, whole = some()
    x = torch.randn(2, TOKENS, CHANNELS, dtype=torch.bfloat16)
    assert torch.equal(x + part, x + whole)
