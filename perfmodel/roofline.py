"""How long the operators of a tape take on a device: what its products or its memory allow."""

from __future__ import annotations

from collections.abc import Iterable

from perfmodel.machine import Device
from perfmodel.tape import Operator

__all__ = ["backward_s", "forward_s", "total_s"]

_ATTENTION = "attention"


def forward_s(operator: Operator, device: Device, dtype: str) -> float:
    """Return the seconds of an operator's forward: the later of arithmetic and memory.

    Raises ValueError for a `dtype` that the device has no rate of. Views and returns take nothing.
    """
    if not operator.matmul_flops and not operator.moved_bytes:
        return 0.0
    return device.operator_s + _work_s(operator, device, dtype, 1)


def backward_s(operator: Operator, device: Device, dtype: str) -> float:
    """Return the seconds of its backward: twice as much of either, a gradient of each input."""
    if not operator.matmul_flops and not operator.moved_bytes:
        return 0.0
    return (2 if operator.matmul_flops else 1) * device.operator_s + _work_s(
        operator, device, dtype, 2
    )


def total_s(operators: Iterable[Operator], device: Device, dtype: str) -> tuple[float, float]:
    """Return the seconds of the forwards and of the backwards of `operators`."""
    listed = list(operators)
    return (
        sum(forward_s(operator, device, dtype) for operator in listed),
        sum(backward_s(operator, device, dtype) for operator in listed),
    )


def _work_s(operator: Operator, device: Device, dtype: str, times: int) -> float:
    if dtype not in device.matmul_flops_per_s:
        raise ValueError(
            f"dtype={dtype!r} has no rate on {device.name}; there are "
            f"{', '.join(device.matmul_flops_per_s)}"
        )
    curve = device.matmul_flops_per_s[dtype]
    if operator.name == _ATTENTION and device.attention_flops_per_s is not None:
        curve = device.attention_flops_per_s
    flops, moved = operator.matmul_flops, operator.moved_bytes
    arithmetic_s = flops / curve.at(flops) if flops else 0.0
    memory_s = moved / device.memory_bytes_per_s.at(moved) if moved else 0.0
    return times * max(arithmetic_s, memory_s)
