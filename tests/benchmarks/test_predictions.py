"""Benchmarks of predictions, run tiny: what they predict, measure and claim is in the record."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from benchmarks import predicted_memory, predicted_time, regret
from benchmarks.activations_worker import Training
from perfmodel.machine import read_machine
from perfmodel.workload import Strategy, Workload

TINY = (2, 64, 2, 32, 4, 256)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers compute on one thread: two that spin on a busy processor take minutes."""
    for program in (predicted_memory, predicted_time, regret):
        monkeypatch.setattr(program, "training_of", one_threaded(program.training_of))


def one_threaded(make: Callable[..., Training]) -> Callable[..., Training]:
    return lambda *given: replace(make(*given), threads=1)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Return the file of a machine that stands for this one."""
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(replace(read_machine("laptop"), link=None).to_json()))
    return file


def recorded(
    program: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *flags: str
) -> dict[str, Any]:
    """Run a program in this process and return its record."""
    argv = [program.__file__, "--json", str(out), "--pairs", "6", "--warm-up", "1", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    program.main()
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def test_predicted_memory_is_held_against_measured(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(predicted_memory, "SIZES", ((2, 256, 4, 256, 4, 512),))
    monkeypatch.setattr(predicted_memory, "PLACED_MODES", ("ssd",))
    monkeypatch.setattr(predicted_memory, "PLACEMENTS", ("ssd",))
    flags = ("--offload-path", str(spill_dir), "--models", "gpt")
    argv = [predicted_memory.__file__, "--json", str(tmp_path / "record.json"), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    predicted_memory.main()
    found = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert len(found["samples"]) == 3 + 1
    assert found["met"] is True
    assert [each.name for each in spill_dir.iterdir()] in ([], ["record.json"])


def test_predicted_times_are_held_against_measured(
    machine: Path, spill_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = [
        predicted_memory.Run("gpt", TINY, "keep"),
        predicted_memory.Run("gpt", TINY, "recompute", "host"),
    ]
    monkeypatch.setattr(predicted_time, "runs_of", lambda models, sizes: runs)
    monkeypatch.setattr(predicted_time, "MOST_TRIES", 1)  # beside other tests nothing is steady
    flags = ("--offload-path", str(spill_dir), "--machine", str(machine), "--steps", "1")
    found = recorded(predicted_time, monkeypatch, tmp_path / "record.json", *flags)
    assert len(found["samples"]) == 2
    assert all(
        seen > 0 and said > 0 for seen, said in (each["step"] for each in found["samples"].values())
    )
    assert found["settings"]["s"] == "measured, predicted"


def test_a_machine_that_changed_decides_nothing() -> None:
    seen = predicted_time.Measured(as_it_was_s=1.0, steady_s=1.0, varied=0.0)
    samples = {"one": (seen, 1.0)}
    steady = predicted_time.Part(samples, {"matmul": 0.05, "memory": -0.05})
    assert predicted_time.make_record([steady]).met
    faster = predicted_time.Part(samples, {"matmul": 0.2, "memory": -0.05})
    assert predicted_time.make_record([faster]).met is None
    slower = predicted_time.Part(samples, {"matmul": 0.0, "memory": -0.2})
    changed = predicted_time.make_record([steady, slower])
    assert changed.met is None
    assert "-0.2" in changed.claims[0].reason


def test_a_part_is_made_again_where_the_machine_changed(
    monkeypatch: pytest.MonkeyPatch, spill_dir: Path
) -> None:
    runs = [predicted_memory.Run("gpt", TINY, "keep")]
    first, second, third = object(), object(), object()
    calibrated = iter([second, third])
    drifts = {(first, second): {"memory": 0.3}, (second, third): {"memory": -0.01}}
    seen = {first: 1.0, second: 2.0}
    monkeypatch.setattr(predicted_time, "calibrate", lambda _: next(calibrated))
    monkeypatch.setattr(predicted_time, "drift", lambda *pair: drifts[pair])
    monkeypatch.setattr(
        predicted_time, "measured", lambda *of: predicted_time.Measured(1.0, seen[of[2]], 0.0)
    )
    monkeypatch.setattr(predicted_time, "predicted_s", lambda *of: seen[of[2]])
    arguments = argparse.Namespace(machine=None, steps=1, warm_up=1)
    with tqdm(total=1, disable=True) as bar:
        part, machine = predicted_time.part_of(runs, first, arguments, str(spill_dir), bar)
    assert part.drift == {"memory": -0.01}
    assert [said for _, said in part.samples.values()] == [2.0]  # by the calibration before it
    assert machine is third


def test_parts_that_were_made_are_not_made_again_but_for_one_that_decides_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = [predicted_memory.Run("gpt", TINY, mode) for mode in ("keep", "recompute", "ssd")]
    seen = predicted_time.Measured(1.0, 1.0, 0.0)
    drifts = iter([0.0, 0.5, 0.0, 0.0])
    made: list[str] = []

    def part_of(some: Any, machine: object, *_: object) -> tuple[Any, object]:
        made.extend(run.mode for run in some)
        samples = {run.name: (seen, 2.0) for run in some}
        return predicted_time.Part(samples, {"memory": next(drifts)}), machine

    monkeypatch.setattr(predicted_time, "part_of", part_of)
    monkeypatch.setattr(predicted_time, "calibrate", lambda _: object())
    keep = tmp_path / "parts.json"
    arguments = argparse.Namespace(machine=None, part=1, keep=keep, steps=6, warm_up=8)
    first = predicted_time.made_parts(runs, arguments, "")
    assert [part.worst_drift for part in first] == [0.0, 0.5, 0.0]
    again = predicted_time.made_parts(runs, arguments, "")
    assert made == ["keep", "recompute", "ssd", "recompute"]
    assert [part.worst_drift for part in again] == [0.0, 0.0, 0.0]
    assert predicted_time.made_parts(runs, arguments, "") == again
    arguments.steps = 7
    with pytest.raises(ValueError, match=r"'steps': 6.*'steps': 7.*another file"):
        predicted_time.made_parts(runs, arguments, "")
    keep.write_text(keep.read_text()[:-9])
    with pytest.raises(ValueError, match="holds no parts of a run"):
        predicted_time.made_parts(runs, arguments, "")
    assert [each.name for each in tmp_path.iterdir()] == [keep.name]


def test_the_try_counts_in_which_the_machine_was_steadiest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries = [predicted_time.Measured(each, each, each) for each in (0.5, 0.3, 0.4)]
    monkeypatch.setattr(predicted_time, "tried", lambda *_: tries.pop(0))
    run = predicted_memory.Run("gpt", TINY, "keep")
    assert predicted_time.measured(run, None, None, 6, 8).varied == 0.3  # type: ignore[arg-type]
    tries = [predicted_time.Measured(1.0, 1.0, 0.05), predicted_time.Measured(1.0, 1.0, 0.01)]
    assert predicted_time.measured(run, None, None, 6, 8).varied == 0.05  # type: ignore[arg-type]


def test_a_choice_is_held_against_the_best_of_what_was_run(
    machine: Path, spill_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def grid(size: regret.Size, kept_bytes: int) -> list[tuple[Workload, Strategy]]:
        workload = regret.workload_of(size)
        again = Strategy(activations="recompute", optimizer="torch")
        return [(workload, Strategy(optimizer="torch")), (workload, again)]

    monkeypatch.setattr(regret, "SIZES", (regret.Size("gpt", 2, 64, 2, 32, 4),))
    monkeypatch.setattr(regret, "LIMITS", (1.5, 0.01))
    monkeypatch.setattr(regret, "grid_of", grid)
    flags = ("--offload-path", str(spill_dir), "--machine", str(machine), "--steps", "1")
    flags = (*flags, "--pairs", "2")
    found = recorded(regret, monkeypatch, tmp_path / "record.json", *flags)
    wide, narrow = found["samples"]["problems"].values()
    assert wide["fits"] is True
    assert len(wide["ratios"]) == 2
    assert wide["fitting"] == 2
    assert narrow == {
        "limit_bytes": narrow["limit_bytes"],
        "fitting": 0,
        "choice": None,
        "met": True,
    }


def test_every_strategy_of_a_grid_is_another() -> None:
    for size in regret.SIZES:
        grid = regret.grid_of(size, 1 << 28)
        names = {regret.named(*each) for each in grid}
        # Of three layers one is a quarter, a half, and all but two.
        assert len(names) == len(grid) == (15 if (size.model, size.layers) == ("gpt", 3) else 17)
        for workload, strategy in grid:
            regret.Plan.of(workload, strategy, path=("/ssd",))
