"""What the command prints besides the doctor's findings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from offload import cli
from offload.cli import main
from offload.config import markdown, schema
from perfmodel.machine import Machine, read_machine


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()


def test_the_page_of_all_keys_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have calibration take no time; return the paths that it was called with."""
    paths: list[str] = []

    def calibrate(path: str, *, progress: Callable[[float], object]) -> Machine:
        paths.append(path)
        progress(0.5)
        progress(1.0)
        return replace(read_machine("laptop"), not_measured=("network_bytes_per_s: why",))

    monkeypatch.setattr(cli, "calibrate", calibrate)
    return paths


def test_a_calibrated_machine_is_one_that_the_model_reads(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "machine.json"
    assert main(["calibrate", str(tmp_path), "-o", str(output), "--name", "mine"]) == 0
    assert measured == [str(tmp_path)]
    machine = read_machine(str(output))
    assert machine.name == "mine"
    assert machine.drive == read_machine("laptop").drive
    assert list(tmp_path.iterdir()) == [output]
    out, err = capsys.readouterr()
    for said in ("matmul, bfloat16", "memory of the device", "update on the host", "link to host"):
        assert said in out
    assert "drive, both at once" in out
    assert "not measured: network_bytes_per_s: why" in out
    assert err.splitlines() == ["measuring: a minute or less", "measuring: done"]


@pytest.mark.parametrize("output", ["nowhere/machine.json", ".", "/dev/null"])
def test_what_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, measured: list[str], output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / output)
    assert main(["calibrate", str(tmp_path), "-o", path]) == 2
    assert measured == []
    err = capsys.readouterr().err
    assert err.startswith("offload calibrate: ")
    assert path in err
    assert len(err.splitlines()) == 1


def test_a_directory_that_is_not_there_is_said_and_nothing_is_written(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "machine.json"
    assert main(["calibrate", str(tmp_path / "none"), "-o", str(output)]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert measured == []
    assert not list(tmp_path.iterdir())


def test_a_drive_that_fails_leaves_the_old_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: str, **_settings: object) -> Machine:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(cli, "calibrate", full)
    output = tmp_path / "machine.json"
    output.write_text("old")
    assert main(["calibrate", str(tmp_path), "-o", str(output)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert output.read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]
