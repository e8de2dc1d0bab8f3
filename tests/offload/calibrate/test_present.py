"""Calibration: a whole machine comes of it, and what was not measured is said."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from offload.calibrate import beside, calibrate
from offload.calibrate.timing import Stopwatch, curve_of
from perfmodel.machine import machine_of


def test_a_machine_comes_of_it_that_a_file_gives_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few and small pieces: what the figures are is measured elsewhere."""
    monkeypatch.setattr("offload.calibrate.present._OPERATOR_MIB", {"cpu": (1, 2)})
    monkeypatch.setattr("offload.calibrate.operators._MOST_COPIES", 1)
    held_up = beside.HeldUp(bytes_per_s=2e9, tensor_s=1e-4)
    monkeypatch.setattr("offload.calibrate.present.measure_held_up", lambda path, rounds: held_up)
    once = partial(Stopwatch, least=1, enough_s=0.0)
    monkeypatch.setattr("offload.calibrate.present.Stopwatch", once)
    parts: list[float] = []
    machine = calibrate(str(tmp_path), device=torch.device("cpu"), rounds=1, progress=parts.append)
    assert machine_of(json.loads(json.dumps(machine.to_json()))) == machine
    assert machine.drive is not None
    assert machine.drive.path == str(tmp_path)
    assert (machine.drive.beside_bytes_per_s, machine.drive.beside_s) == (2e9, 1e-4)
    assert machine.link is None
    assert {"float32", "bfloat16"} == set(machine.device.matmul_flops_per_s)
    names = {"gelu", "layer norm backward", "attention float32", "linear backward bfloat16"}
    names |= {"attention to all backward float32", "attention to all bfloat16"}
    assert names <= set(machine.device.operators_per_s)
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
    curve = curve_of([(20.0, 200.0, [1.0, 2.0, 9.0]), (10.0, 100.0, [1.0, 1.0, 1.0])])
    assert curve.sizes == (10.0, 20.0)
    assert curve.rates == (100.0, 100.0)


def test_work_is_done_once_more_than_it_is_timed() -> None:
    calls: list[None] = []
    watch = Stopwatch(torch.device("cpu"), least=3, enough_s=0.0)
    assert len(watch.seconds(lambda: calls.append(None))) == 3
    assert len(calls) == 4


def test_work_goes_round_and_what_it_made_lives_until_its_turn_comes_again() -> None:
    calls: list[int] = []
    alive: list[int] = []

    class Made:
        def __init__(self, number: int) -> None:
            calls.append(number)
            alive.append(number)
            self._number = number

        def __del__(self) -> None:
            alive.remove(self._number)

    works = [partial(Made, number) for number in range(3)]
    watch = Stopwatch(torch.device("cpu"), least=2, enough_s=0.0)
    assert len(watch.seconds(*works)) == 3, "each of them at least"
    assert calls == [0, 1, 2, 0, 1, 2]
    assert not alive


def test_what_a_byte_and_a_tensor_cost_follow_from_small_and_large_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    byte_s, tensor_s = 1e-10, 5e-4
    lost = {1024: (100e6, 10), 8192: (800e6, 10)}

    def held_up(path: str, tokens: int, rounds: int) -> tuple[int, int, float]:
        nbytes, count = lost[tokens]
        return int(nbytes), count, nbytes * byte_s + count * tensor_s

    monkeypatch.setattr(beside, "_held_up", held_up)
    found = beside.measure_held_up("/any", 1)
    assert found is not None
    assert found.bytes_per_s == pytest.approx(1 / byte_s)
    assert found.tensor_s == pytest.approx(tensor_s)
    monkeypatch.setattr(beside, "_held_up", lambda path, tokens, rounds: (tokens, 1, -1e-3))
    assert beside.measure_held_up("/any", 1) is None, "noise"
    monkeypatch.setattr(beside, "_held_up", lambda path, tokens, rounds: (0, 0, 1e-3))
    assert beside.measure_held_up("/any", 1) is None, "nothing moved"


def test_a_step_moves_what_its_layers_save(tmp_path: Path) -> None:
    nbytes, count, _ = beside._held_up(str(tmp_path), 1024, 1)
    assert nbytes == 2 * count * 1024 * 512 * 4
    assert count > 6, "of six layers two tensors each, but for what stays"
