"""Calibration: a whole machine comes of it, and what was not measured is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from offload.calibrate import calibrate
from offload.calibrate.timing import Stopwatch, curve_of
from perfmodel.machine import machine_of


def test_a_machine_comes_of_it_that_a_file_gives_back(tmp_path: Path) -> None:
    parts: list[float] = []
    machine = calibrate(str(tmp_path), device=torch.device("cpu"), rounds=1, progress=parts.append)
    assert machine_of(json.loads(json.dumps(machine.to_json()))) == machine
    assert machine.drive is not None
    assert machine.drive.path == str(tmp_path)
    assert machine.link is None
    assert {"float32", "bfloat16"} == set(machine.device.matmul_flops_per_s)
    assert {"attention", "gelu", "layer norm backward"} <= set(machine.device.operators_per_s)
    assert any("rated_bytes" in each for each in machine.not_measured)
    assert parts == sorted(parts)
    assert parts[-1] == 1
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there_is_named_and_nothing_else_is_measured(
    tmp_path: Path,
) -> None:
    with pytest.raises(OSError, match="nowhere") as caught:
        calibrate(str(tmp_path / "nowhere"), rounds=1)
    assert caught.value.filename == str(tmp_path / "nowhere")


def test_a_curve_has_the_median_rate_of_each_size() -> None:
    curve = curve_of([(200.0, [1.0, 2.0, 9.0]), (100.0, [1.0, 1.0, 1.0])])
    assert curve.sizes == (100.0, 200.0)
    assert curve.rates == (100.0, 100.0)


def test_work_is_done_once_more_than_it_is_timed() -> None:
    calls: list[None] = []
    watch = Stopwatch(torch.device("cpu"), least=3, enough_s=0.0)
    assert len(watch.seconds(lambda: calls.append(None))) == 3
    assert len(calls) == 4
