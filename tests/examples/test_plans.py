"""Plans of the main job: made, obeyed, predicted beside measured, and refused for another job."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import offload.session
from perfmodel.cli import main as perfmodel
from perfmodel.machine import Machine, read_machine

Main = Callable[..., int]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Machine, Path]:
    """Return a machine without a GPU that stands for this one, and its file."""
    machine = replace(read_machine("laptop"), link=None, name="here")
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(machine.to_json()))
    monkeypatch.setattr(offload.session, "present_machine", lambda path: machine)
    return machine, file


def plan_with(file: Path, plan: Path, spill: Path, *flags: str, model: str = "gpt") -> None:
    """Have the command make a plan for what these tests train."""
    shape = ("--layers=2", "--hidden=64", "--heads=2", "--seq-len=64", "--vocab=256")
    args = [
        *("plan", f"--model={model}", *shape, "--micro-batch=4", "--dtype=float32"),
        *(f"--machine={file}", f"--path={spill}", f"-o{plan}", *flags),
    ]
    assert perfmodel(args) == 0


@pytest.mark.parametrize("model", ["gpt", "t5"])
@pytest.mark.parametrize("how", ["recompute", "ssd", "keep"])
def test_a_plan_of_the_command_is_obeyed_and_changes_no_loss(
    how: str,
    model: str,
    here: tuple[Machine, Path],
    main: Main,
    tmp_path: Path,
    spill_dir: Path,
) -> None:
    plan, summary = tmp_path / "plan.json", tmp_path / "summary.json"
    plan_with(here[1], plan, spill_dir, f"--activations={how}", "--keep-micro-batch", model=model)
    found: list[dict[str, Any]] = []
    for flags in ([f"--plan={plan}"], []):
        flags = [f"--model={model}", f"--summary={summary}", *flags]
        assert main(*flags) == 0
        found.append(json.loads(summary.read_text()))
    assert found[0]["losses"] == found[1]["losses"]
    made = json.loads(plan.read_text())["predicted"]
    said = {key: made[key] for key in ("step_s", "peak_device_bytes")}
    assert found[0]["predicted"] == said
    assert found[1]["predicted"] is None
    if how != "ssd":  # so little is there that its staging is most of all
        assert found[0]["peak_device_bytes"] == pytest.approx(said["peak_device_bytes"], rel=0.06)


def test_without_a_file_a_plan_is_made_within_the_limit(
    here: tuple[Machine, Path], main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary.json"
    flags = ("--plan=auto", f"--offload-path={tmp_path}", f"--summary={summary}")
    assert main(*flags) == 0
    assert json.loads(summary.read_text())["predicted"]["step_s"] > 0
    assert "predicted were" in capsys.readouterr().out
    assert main("--plan=auto", "--device-memory=1MiB", f"--offload-path={tmp_path}") == 2
    assert "no plan fits" in capsys.readouterr().err


def test_a_plan_for_another_job_is_refused_in_one_line(
    here: tuple[Machine, Path],
    main: Main,
    tmp_path: Path,
    spill_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = tmp_path / "plan.json"
    plan_with(here[1], plan, spill_dir)
    capsys.readouterr()
    for flags, said in (
        (["--device-memory=1GiB"], "--device-memory is a limit for --plan auto"),
        (["--layers=3"], "num_layers is 2 in the plan and 3 here"),
        (["--micro-batch=8"], "and the flags 8 sequences a step"),
        (["--dtype=bf16"], "--plan is made for --dtype fp32"),
    ):
        assert main(f"--plan={plan}", *flags) == 2
        err = capsys.readouterr().err
        assert said in err
        assert len(err.strip().splitlines()) == 1
    assert main("--plan=nowhere.json") == 2
    assert "--plan nowhere.json" in capsys.readouterr().err
