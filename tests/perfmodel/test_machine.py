"""Machines: those described here are sound, files are read as written, and errors name the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.machine import Curve, known_machines, machine_of, read_machine

NAMED = {
    *("a100-40gb-pcie", "a100-40gb-sxm", "a100-80gb-pcie", "a100-80gb-sxm", "h100-sxm"),
    *("h200-sxm", "rtx-4090", "gh200", "l40s", "laptop", "ssdtrain", "dos-h100", "lemo-a800"),
}


@pytest.mark.parametrize("name", known_machines())
def test_a_machine_that_is_described_here_is_sound_and_comes_back_from_json(name: str) -> None:
    machine = read_machine(name)
    assert machine.name == name
    assert machine.source
    assert machine_of(json.loads(json.dumps(machine.to_json()))) == machine
    device = machine.device
    assert 1 << 32 < device.memory_bytes < 1 << 40
    fast = device.matmul_flops_per_s["bfloat16"]
    assert fast.at(1e8) < fast.at(1e12) < 1e15
    assert machine.link is not None
    assert machine.link.to_host_bytes_per_s < device.memory_bytes_per_s.at(1e9)
    assert machine.drive is not None
    assert machine.drive.write_bytes_per_s <= machine.drive.mixed_bytes_per_s


def test_the_machines_that_users_ask_for_are_there() -> None:
    assert set(known_machines()) == NAMED


def described() -> dict[str, Any]:
    return read_machine("laptop").to_json()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("host",), None, r"machine.host is an object with keys, not None"),
        (("host", "cores"), "many", r"machine.host.cores='many' is no number"),
        (("host", "memory_bytes"), "64GBB", r"machine.host.memory_bytes='64GBB' is not a size"),
        (("drive", "free_bytes"), -1, r"drive.free_bytes=-1 is not a number"),
        (("drive", "write_bytes_per_s"), 0, r"drive.write_bytes_per_s=0 is not a number from 1"),
        (("device", "memory_bytes_per_s"), "fast", r"'fast' is no rate"),
        (("device", "memory_bytes_per_s"), {"sizes": [2, 1], "rates": [1, 1]}, r"no curve"),
        (("device", "matmul_flops"), 1, r"device.matmul_flops is not a setting, did you mean"),
        (("device", "matmul_flops_per_s"), 5, r"matmul_flops_per_s is an object with a rate"),
        (("device", "memory_bytes_per_s"), {"sizes": 2, "rates": [1]}, r"a value of no number"),
        (("device", "name"), 4060, r"machine.device.name=4060 is no text"),
        (("not_measured",), None, r"machine.not_measured=None is not a list of texts"),
        (("devices",), 0, r"devices=0 is not a number from 1"),
    ],
)
def test_a_wrong_figure_is_refused_by_its_key(
    path: tuple[str, ...], value: object, message: str
) -> None:
    data: Any = described()
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        machine_of(data)


def test_sizes_may_have_units_and_missing_keys_are_named() -> None:
    data = described()
    data["host"]["memory_bytes"] = "64GiB"
    assert machine_of(data).host.memory_bytes == 64 << 30
    del data["host"]["memory_bytes"]
    with pytest.raises(ValueError, match=r"machine.host.memory_bytes is missing"):
        machine_of(data)
    with pytest.raises(ValueError, match=r"machine is an object with keys, not \[\]"):
        machine_of([])


def test_a_machine_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(described() | {"name": "mine"}))
    assert read_machine(str(path)).name == "mine"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"mine.json: "):
        read_machine(str(path))
    with pytest.raises(ValueError, match=r"machine='h100' is not known.*did you mean"):
        read_machine("h100")
    with pytest.raises(FileNotFoundError):
        read_machine(str(tmp_path / "other.json"))


@given(
    st.lists(
        st.tuples(st.floats(1, 1e12), st.floats(1, 1e15)),
        min_size=1,
        max_size=6,
        unique_by=lambda pair: pair[0],
    ),
    st.floats(0.1, 1e13),
)
def test_between_two_sizes_a_rate_is_between_theirs(
    points: list[tuple[float, float]], size: float
) -> None:
    points.sort()
    sizes, rates = zip(*points, strict=True)
    curve = Curve(sizes, rates)
    assert min(rates) * (1 - 1e-9) <= curve.at(size) <= max(rates) * (1 + 1e-9)
    assert all(curve.at(at) == pytest.approx(rate) for at, rate in points)
    assert Curve.of({"sizes": list(sizes), "rates": list(rates)}) == curve
