"""Every command of the guides in docs/ is run as it stands, in their order."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from perfmodel.cli import COMMANDS, main

DOCS = Path(__file__).parents[1] / "docs"
PLANNING = (DOCS / "planning.md").read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", PLANNING, flags=re.M | re.S)
    for line in block.splitlines()
]


def test_the_guide_has_every_command() -> None:
    assert {shlex.split(line)[1] for line in LINES} == set(COMMANDS)


def test_the_commands_of_the_guide_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in LINES:
        program, *words = shlex.split(line)
        assert program == "perfmodel"
        assert main(words) == 0, capsys.readouterr().err
        assert capsys.readouterr().out, line
    assert {each.name for each in tmp_path.iterdir()} == {"plan.json", "chart.svg", "step.svg"}


def test_the_example_of_the_guide_runs(tmp_path: Path) -> None:
    [example] = re.findall(r"^```python\n(.*?)^```", PLANNING, flags=re.M | re.S)
    file = tmp_path / "example.py"
    file.write_text(example, encoding="utf-8")
    subprocess.run([sys.executable, file], check=True, timeout=100, cwd=DOCS.parent)


def test_flags_that_the_guide_names_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    known = set()
    for command in COMMANDS:
        main([command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    example = (DOCS.parent / "examples" / "plans.py").read_text(encoding="utf-8")
    known |= set(re.findall(r"--[a-z][a-z-]+", example)) | {"--summary"}
    assert set(re.findall(r"--[a-z][a-z-]+", PLANNING)) <= known
