"""A plan that was written is predicted again, drawn, and refused for another workload."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from perfmodel.machine import read_machine
from perfmodel.plan_file import read_plan
from tests.perfmodel.said import BATCH, PLAN, SMALL, said


def test_a_written_plan_is_read_and_predicted_as_it_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = str(tmp_path / "plan.json")
    for extra in ([], ["--activations", "ssd", "--placement", "ssd", "--optimizer", "offload"]):
        said(capsys, *PLAN, *extra, "--path", "/nvme/spill", "-o", path)
        plan = read_plan(path)
        assert plan.is_for_machine(read_machine("rtx-4090"))
        found = json.loads(said(capsys, "predict", path, "--machine", "rtx-4090", "--json"))
        assert found["made_with_this_machine"]
        assert plan.predicted is not None
        # A search looks at fewer layers, and less closely, than a prediction.
        for key, then in (
            ("device_bytes", plan.predicted.peak_device_bytes),
            ("ssd_write_bytes", plan.predicted.ssd_write_bytes),
            ("step_s", plan.predicted.step_s),
        ):
            assert found["predicted"][key] == pytest.approx(then, rel=0.1), key


def test_a_step_is_drawn_over_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan, picture = str(tmp_path / "plan.json"), tmp_path / "step.svg"
    moved = ["--activations", "ssd", "--placement", "host", "--optimizer", "offload"]
    large = ["plan", "--layers", "4", "--hidden", "1024", "--heads", "8", "--seq-len", "1024"]
    batch = ["--micro-batch", "4", "--accumulation", "2", "--machine", "rtx-4090"]
    said(capsys, *large, *batch, *moved, "--path", "/nvme", "-o", plan)
    written = json.loads(Path(plan).read_text())
    written["activations"]["memory_bytes"] = None  # as much leaves as costs no time
    Path(plan).write_text(json.dumps(written))
    predict = ["predict", plan, "--machine", "rtx-4090"]
    said(capsys, *predict, "-o", str(picture))
    root = ElementTree.fromstring(picture.read_text())
    words = ["".join(each.itertext()) for each in root]
    for part in ("forward", "backward", "update", "ssd write", "to host", "seconds"):
        assert part in words, part
    assert any("predicted peak" in each for each in words)
    assert "a.png: what is drawn is" in said(capsys, *predict, "-o", "a.png", status=2)


def test_a_plan_for_another_workload_is_not_predicted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = str(tmp_path / "plan.json")
    said(capsys, *PLAN, "--keep-micro-batch", "-o", path, "--path", "/nvme")
    same = ["predict", path, *SMALL, *BATCH, "--machine"]
    assert "another machine's speeds" in said(capsys, *same, "laptop")
    err = said(capsys, *same, "laptop", "--accumulation", "2", status=2)
    assert "accumulation is 1 in the plan and 2 here" in err


def test_a_plan_that_split_its_batch_is_predicted_with_the_flags_that_made_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = str(tmp_path / "plan.json")
    flags = [*SMALL, "--seq-len", "256", "--micro-batch", "1", "--accumulation", "8"]
    said(capsys, "plan", *flags, "--machine", "rtx-4090", "-o", path, "--path", "/nvme")
    assert read_plan(path).micro_batch == 8
    assert "predicted" in said(capsys, "predict", path, *flags, "--machine", "rtx-4090")
    alone = ["predict", path, "--machine", "rtx-4090", "--seq-len", "512"]
    assert "--seq-len is nothing without --model" in said(capsys, *alone, status=2)


def test_a_plan_that_does_not_fit_another_machine_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = str(tmp_path / "plan.json")
    words = ["plan", "--model", "gpt2-xl", "--seq-len", "1024", "--micro-batch", "2"]
    said(capsys, *words, "--machine", "rtx-4090", "--path", "/nvme", "-o", path)
    err = said(capsys, "predict", path, "--machine", "laptop", status=3)
    assert "it does not fit" in err
    assert "of device memory, and there are" in err
