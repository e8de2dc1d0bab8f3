"""Shapes that ranks cannot share are refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.model import Model
from perfmodel.shape import CPU, Kernels, Shape

MODEL = Model(num_layers=1, hidden_size=24, num_heads=6, vocab_size=10, ffn_size=36)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"tensor": 0}, "tensor=0"),
        ({"context": 0}, "context=0"),
        ({"sequence": 1}, "sequence=1"),
        ({"context": 5}, "context=5 does not divide seq_len=16"),
        ({"tensor": 3, "sequence": True}, "sequence=True with tensor=3 and context=1 does not"),
        (
            {"context": 2, "kernels": Kernels(fused_attention=False)},
            "context=2 needs fused_attention=True",
        ),
    ],
)
def test_a_wrong_shape_is_refused(more: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Shape(**{"batch": 2, "seq_len": 16, "kernels": CPU} | more)


@pytest.mark.parametrize(
    ("more", "model", "match"),
    [
        ({"tensor": 4}, {}, "tensor=4 does not divide num_heads=6"),
        ({"tensor": 3}, {"ffn_size": 32}, "tensor=3 does not divide ffn_size=32"),
        ({"tensor": 2}, {"num_kv_heads": 3}, "tensor=2 neither divides num_kv_heads=3 nor is a"),
        ({"context": 2}, {"positions": "relative"}, "context=2 needs attention without"),
        ({"context": 2}, {"score_softcap": True}, "context=2 needs attention without"),
    ],
)
def test_a_model_that_ranks_cannot_share_is_refused(
    more: dict[str, Any], model: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        Shape(batch=2, seq_len=12, **more).check(replace(MODEL, **model))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_ranks_together_have_all_positions(
    batch: int, context: int, tensor: int, sequence: bool
) -> None:
    shape = Shape(
        batch=batch,
        seq_len=5 * context * tensor,
        context=context,
        tensor=tensor,
        sequence=sequence,
    )
    assert shape.rows * context == shape.tokens
    assert shape.stream_rows * (tensor if sequence else 1) == shape.rows
