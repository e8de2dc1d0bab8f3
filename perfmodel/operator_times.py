"""How long a tape's operators take on a device, each for itself, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perfmodel.machine import Curve, Device
from perfmodel.tape import Operator, Value

__all__ = ["BACKWARD", "OperatorTimes", "operator_times"]

BACKWARD = " backward"
"""Behind an operator's name in `Device.operators_per_s`."""
# Operators of a tape that are to a device what another one is.
_ALIKE = {
    "rotate": "weigh",
    "scale": "gate",
    "gelu_tanh": "gelu",
    "rms norm": "layer norm",
    "attention to all": "attention",
}
# Fused attention: its backward has four products, and one of the forward's two once more.
_RECOMPUTED = 5 / 4
_RECOMPUTE = ("attention", "attention to all")
# What is added to something is read, as is that, and written.
_ADDED = 3


@dataclass(frozen=True)
class OperatorTimes:
    """Seconds of each operator of a tape, in the order of the tape."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]

    @property
    def total_s(self) -> float:
        """Of the whole forward and the whole backward."""
        return sum(self.forward_s) + sum(self.backward_s)


def operator_times(operators: Sequence[Operator], device: Device, dtype: str) -> OperatorTimes:
    """Return the times of a tape's `operators`, where gradients of parameters are added up.

    Products of matrices take their flops, each of their two gradients as many, whatever they move;
    all else its bytes. The backward of fused attention computes its scores again: 2.5 times the
    forward's flops. A device's own rate for an operator comes first; for that backward it counts
    twice the forward's flops, as calibration does. Raises ValueError for a `dtype` that the device
    has no rate for.
    """
    if dtype not in device.matmul_flops_per_s:
        known = ", ".join(device.matmul_flops_per_s)
        raise ValueError(f"dtype={dtype!r}: {device.name!r} has rates for {known}")
    times = _Times(device, dtype)
    backward_s = [times.backward_s(operator) for operator in reversed(operators)]
    return OperatorTimes(tuple(map(times.forward_s, operators)), tuple(reversed(backward_s)))


class _Times:
    def __init__(self, device: Device, dtype: str) -> None:
        self._device, self._dtype = device, dtype
        self._matmul = device.matmul_flops_per_s[dtype]
        self._seen: set[Value] = set()  # that have a gradient by now

    def forward_s(self, operator: Operator) -> float:
        if _is_view(operator):
            return 0.0
        return self._device.operator_s + self._work_s(operator, "", 1)

    def backward_s(self, operator: Operator) -> float:
        """Return the time of one; they come in the backward's order."""
        trained = [value for value in operator.reads if value.trained]
        if not operator.writes or not (trained or operator.param_bytes):
            return 0.0
        added_bytes = sum(value.nbytes for value in trained if value in self._seen)
        self._seen.update(trained)
        seconds = self._moving_s(_ADDED * (added_bytes + operator.param_bytes))
        if operator.passes:
            return seconds
        if _is_view(operator):  # several views' gradients are put together in new memory
            return seconds + self._moving_s(2 * operator.reads[0].nbytes)
        products = min(
            operator.matmul_gradients,
            bool(trained) + bool(operator.param_bytes or len(operator.reads) > 1),
        )
        return self._device.operator_s + seconds + self._work_s(operator, BACKWARD, products)

    def _work_s(self, operator: Operator, way: str, products: float) -> float:
        if operator.matmul_flops:
            own = self._rate(operator.name, f"{way} {self._dtype}")
            if own is None and way and operator.name in _RECOMPUTE:
                products *= _RECOMPUTED
            return products * operator.matmul_flops / self._flops_per_s(operator, own)
        rate = self._rate(operator.name, way)
        nbytes = max(1.0, operator.moved_bytes)
        if rate is not None:
            return nbytes / rate.at(nbytes)
        return (2 if way else 1) * self._moving_s(nbytes)

    def _rate(self, name: str, way: str) -> Curve | None:
        rates = self._device.operators_per_s
        return rates.get(name + way) or rates.get(_ALIKE.get(name, name) + way)

    def _flops_per_s(self, operator: Operator, rate: Curve | None) -> float:
        if rate is None:
            return self._matmul.at(operator.matmul_flops)
        if operator.name.startswith("attention"):
            # What it reaches depends on how long a sequence is, not on how many there are.
            queries_bytes = max(1, operator.reads[0].nbytes)
            return rate.at(operator.matmul_flops / queries_bytes)
        return rate.at(operator.matmul_flops)

    def _moving_s(self, nbytes: float) -> float:
        return nbytes / self._device.memory_bytes_per_s.at(nbytes) if nbytes else 0.0


def _is_view(operator: Operator) -> bool:
    return all(value.base is not None for value in operator.writes)
