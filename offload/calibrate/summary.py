"""A measured machine as people read it."""

from __future__ import annotations

from collections.abc import Iterator

from perfmodel.commands.tables import ascii_line, digits, table
from perfmodel.machine import Curve, Machine

__all__ = ["machine_lines"]


def machine_lines(machine: Machine) -> list[str]:
    """Return a short table of what was measured, and what was not."""
    device = machine.device
    lines = [
        ascii_line(f"{machine.name}: {machine.devices} x {device.name}, {machine.host.cores} cores")
    ]
    rows = [*_computing(machine), *_moving(machine)]
    lines += ["", *table(("measured", "", "smallest", "largest", "spread"), rows, left=2), ""]
    return [*lines, *(ascii_line(f"not measured: {each}") for each in machine.not_measured)]


def _curve(name: str, unit: str, curve: Curve, scale: float) -> list[str]:
    """Return a row: the rates of the smallest and the largest pieces."""
    ends = (digits(rate / scale) for rate in (curve.rates[0], curve.rates[-1]))
    return [name, unit, *ends, f"{curve.spread:.0%}"]


def _rate(name: str, unit: str, rate: float) -> list[str]:
    return [name, unit, "", digits(rate / 1e9), ""]


def _computing(machine: Machine) -> Iterator[list[str]]:
    device = machine.device
    for dtype, curve in device.matmul_flops_per_s.items():
        yield _curve(f"matmul, {dtype}", "GFLOP/s", curve, 1e9)
    for name, curve in device.operators_per_s.items():
        if name.startswith("attention"):
            yield _curve(name, "GFLOP/s", curve, 1e9)
    yield _curve("memory of the device", "GB/s", device.memory_bytes_per_s, 1e9)
    yield _rate("memory of the host", "GB/s", machine.host.memory_bytes_per_s)
    yield _rate("update on the device", "Gparams/s", device.update_params_per_s)
    yield _rate("update on the host", "Gparams/s", machine.host.update_params_per_s)


def _moving(machine: Machine) -> Iterator[list[str]]:
    link, drive = machine.link, machine.drive
    if link is not None:
        yield _rate("link to host", "GB/s", link.to_host_bytes_per_s)
        yield _rate("link to device", "GB/s", link.to_device_bytes_per_s)
        yield _rate("link, both ways", "GB/s", link.both_bytes_per_s)
    if drive is not None:
        yield _rate("drive, written", "GB/s", drive.write_bytes_per_s)
        yield _rate("drive, read", "GB/s", drive.read_bytes_per_s)
        yield _rate("drive, both at once", "GB/s", drive.mixed_bytes_per_s)
