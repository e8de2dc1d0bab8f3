"""Seconds of operators, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perfmodel.machine import Curve, Device
from perfmodel.roofline import backward_s, forward_s, total_s
from perfmodel.tape import Operator

DEVICE = Device(
    name="one",
    memory_bytes=1,
    matmul_flops_per_s={"bfloat16": Curve.of(1e12)},
    memory_bytes_per_s=Curve.of(1e9),
    operator_s=1e-6,
)


def test_an_operator_takes_what_its_arithmetic_or_its_memory_takes() -> None:
    product = Operator("linear", matmul_flops=2e12, moved_bytes=1e9)
    assert forward_s(product, DEVICE, "bfloat16") == pytest.approx(2 + 1e-6)
    assert backward_s(product, DEVICE, "bfloat16") == pytest.approx(4 + 2e-6)
    moved = replace(product, moved_bytes=5e9)
    assert forward_s(moved, DEVICE, "bfloat16") == pytest.approx(5 + 1e-6)
    assert total_s([product, moved], DEVICE, "bfloat16") == pytest.approx((7, 14), rel=1e-4)


def test_a_view_takes_nothing() -> None:
    assert total_s([Operator("view")], DEVICE, "bfloat16") == (0, 0)


def test_attention_has_a_rate_of_its_own() -> None:
    device = replace(DEVICE, attention_flops_per_s=Curve.of(1e11))
    attention = Operator("attention", matmul_flops=1e12)
    assert forward_s(attention, device, "bfloat16") == pytest.approx(10, rel=1e-4)
    assert forward_s(attention, DEVICE, "bfloat16") == pytest.approx(1, rel=1e-4)


def test_a_type_without_a_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype='float64'"):
        forward_s(Operator("linear", matmul_flops=1.0), DEVICE, "float64")
