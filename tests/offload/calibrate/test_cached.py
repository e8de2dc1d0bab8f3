"""The machine is measured once, and again where what was measured is old, broken or elsewhere."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from offload.calibrate import cached
from perfmodel.machine import Machine, read_machine

FREE_BYTES = 123


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Return the directories that were measured; nothing really is."""
    calls: list[str | None] = []

    def calibrate(path: str | None) -> Machine:
        calls.append(path)
        machine = read_machine("laptop")
        drive = replace(machine.drive, free_bytes=FREE_BYTES)
        return replace(machine, name=f"number {len(calls)}", drive=drive)

    monkeypatch.setattr(cached, "calibrate", calibrate)
    return calls


def test_it_is_measured_once_for_each_directory(tmp_path: Path, measured: list[str | None]) -> None:
    one, other = (str(tmp_path / name) for name in ("one", "other"))
    for path in (one, other):
        Path(path).mkdir()
    for chosen in (one, one, other, None):
        machine = cached.present_machine(chosen, cache=tmp_path / "new")
    assert measured == [one, other, None]
    machine = cached.present_machine(one, cache=tmp_path / "new")
    assert machine.name == "number 1"
    assert machine.drive is not None
    assert machine.drive.free_bytes != FREE_BYTES, "which is what was free when it was measured"


def test_what_is_old_or_broken_is_measured_again(
    tmp_path: Path, measured: list[str | None]
) -> None:
    cached.present_machine("/one", cache=tmp_path)
    [file] = tmp_path.iterdir()
    file.write_text("{")
    assert cached.present_machine("/one", cache=tmp_path).name == "number 2"
    os.utime(file, (0, 0))
    assert cached.present_machine("/one", cache=tmp_path).name == "number 3"
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
