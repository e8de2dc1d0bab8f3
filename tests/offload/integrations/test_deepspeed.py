"""DeepSpeed with a section `offload`: the same bits as stock, wherever activations and states lie.

All cases of a number of ranks run in one start of them, which takes as long as a hundred cases.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("deepspeed_run.py")
ADAMW = {"lr": 1e-3, "weight_decay": 0.1}
MATRIX = [*itertools.product((0, 1, 2, 3), ("fp32", "bf16"), (1, 3), (0.0, 0.05))]

GOES = [
    ("moved", "host"),
    ("moved", "kept"),
    ("kept", "moved"),
    ("torch", "moved"),
    ("moved", "torch"),
]
"""Who saves, and who goes on."""

Ran = list[dict[str, Any]]
"""Of each rank what its cases came to, by name."""
Start = Callable[..., Ran]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`start(ranks, cases)` trains all cases in processes of their own."""

    def run(ranks: int, cases: dict[str, Any]) -> Ran:
        place = tmp_path_factory.mktemp("deepspeed")
        (place / "cases.json").write_text(json.dumps({"cases": cases}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={ranks}", str(PROGRAM)]
        command += [str(place / "cases.json"), str(place / "out")]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads((place / f"out.{rank}.json").read_text()) for rank in range(ranks)]

    return run


def config_of(
    stage: int, dtype: str = "fp32", accumulation: int = 1, clip: float = 0.0
) -> dict[str, Any]:
    """Return a DeepSpeed config without an optimizer."""
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 64,
        "gradient_accumulation_steps": accumulation,
        "steps_per_print": 1 << 30,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if stage == 3:  # several subgroups, and no parameter that always stays
        found["zero_optimization"] |= {
            "sub_group_size": 1000,
            "stage3_param_persistence_threshold": 0,
        }
    if clip:
        found["gradient_clipping"] = clip
    if dtype == "bf16":
        found["bf16"] = {"enabled": True}
    return found


def with_offload(config: dict[str, Any], directory: Path, placement: str) -> dict[str, Any]:
    """Return a config with activations on the SSD and states at `placement`."""
    path = str(directory)
    states = {
        "placement": placement,
        "path": path,
        "subgroup_params": 500,
        "staging_bytes": 1 << 20,
    }
    if placement == "host":
        states.pop("path")
    moved = {"mode": "ssd", "path": path, "min_tensor_bytes": 1024, "staging_bytes": 1 << 20}
    return {
        **config,
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "offload": {"activations": moved, "optimizer": states},
    }


def name_of(case: tuple[Any, ...], what: str) -> str:
    """Return what a case is called."""
    return f"{what}: zero {case[0]}, {case[1]}, {case[2]} x, clip {case[3]:g}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_parameters_have_the_bits_of_no_offload(
    start: Start, spill_dir: Path, ranks: int
) -> None:
    cases: dict[str, Any] = {}
    for number, case in enumerate(MATRIX):
        config = config_of(*case)
        if case[0]:  # with which DeepSpeed adds the norm up in another order, for clipping
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        cases[name_of(case, "kept")] = {"config": config, "stock": True, "client": ADAMW}
        placement = ("ssd", "host", "host=0.5,ssd=0.5")[number % 3]
        moved = with_offload(config_of(*case), spill_dir, placement)
        cases[name_of(case, "moved")] = {"config": moved}
    for rank in start(ranks, cases):
        for case in MATRIX:
            kept, moved = rank[name_of(case, "kept")], rank[name_of(case, "moved")]
            assert "error" not in kept, kept["trace"]
            assert "error" not in moved, moved["trace"]
            assert moved["offloaded"] > 0
            assert moved["losses"] == kept["losses"], name_of(case, "losses")
            assert moved["parameters"] == kept["parameters"], name_of(case, "parameters")


def test_groups_schedules_and_checkpointing_change_nothing(start: Start, spill_dir: Path) -> None:
    cases: dict[str, Any] = {}
    for stage, again in itertools.product((0, 1, 2, 3), ("", "torch", "deepspeed")):
        for what, config in (
            ("kept", config_of(stage)),
            ("moved", with_offload(config_of(stage), spill_dir, "ssd")),
        ):
            case = {"config": config, "groups": True, "scheduled": True, "again": again}
            case |= {"stock": True, "client": ADAMW} if what == "kept" else {}
            cases[f"{what} {stage} {again}"] = case
    [found] = start(1, cases)
    for name, moved in found.items():
        if name.startswith("moved"):
            kept = found[name.replace("moved", "kept")]
            assert "error" not in moved, moved["trace"]
            assert moved["losses"] == kept["losses"], name
            assert moved["parameters"] == kept["parameters"], name


def test_stock_torch_adamw_ends_in_nearly_the_same_losses(start: Start, spill_dir: Path) -> None:
    stock = config_of(2) | {"optimizer": {"type": "AdamW", "params": ADAMW | {"torch_adam": True}}}
    cases = {
        "stock": {"config": stock, "stock": True},
        "moved": {"config": with_offload(config_of(2), spill_dir, "ssd")},
    }
    [found] = start(1, cases)
    assert found["moved"]["losses"] == pytest.approx(found["stock"]["losses"], rel=1e-6)


def test_without_the_section_it_is_stock(start: Start) -> None:
    stock = config_of(2) | {"optimizer": {"type": "AdamW", "params": ADAMW | {"torch_adam": True}}}
    [found] = start(1, {"ours": {"config": stock}, "stock": {"config": stock, "stock": True}})
    assert found["ours"] == found["stock"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_go_both_ways_and_to_another_placement(
    start: Start, spill_dir: Path, tmp_path: Path, ranks: int
) -> None:
    stages = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]
    cases: dict[str, Any] = {}
    for stage, dtype in stages:
        name, plain = f"{stage} {dtype}", config_of(stage, dtype)
        torchs = {"type": "AdamW", "params": ADAMW | {"torch_adam": True}}
        ways = {
            "kept": {"config": plain, "stock": True, "client": ADAMW},
            "moved": {"config": with_offload(plain, spill_dir, "ssd")},
            "host": {"config": with_offload(plain, spill_dir, "host")},
            "torch": {"config": plain | {"optimizer": torchs}, "stock": True},
        }
        cases[f"whole {name}"] = {**ways["kept"], "steps": 4}
        for way in ("kept", "moved", "torch"):
            directory = str(tmp_path / f"{way} {name}")
            cases[f"{way} begun {name}"] = {**ways[way], "steps": 2, "save": directory}
        for first, then in GOES:
            directory = str(tmp_path / f"{first} {name}")
            cases[f"{first} to {then} {name}"] = {**ways[then], "steps": 2, "resume": directory}
    found = start(ranks, cases)[0]
    for (stage, dtype), (first, then) in itertools.product(stages, GOES):
        name = f"{stage} {dtype}"
        whole, resumed = found[f"whole {name}"], found[f"{first} to {then} {name}"]
        assert "error" not in resumed, resumed["trace"]
        if "torch" in (first, then):  # the last elements of an array end in other bits
            assert resumed["losses"] == pytest.approx(whole["losses"][2:], rel=1e-2), name
        else:
            assert resumed["losses"] == whole["losses"][2:], (first, then, name)
            assert resumed["parameters"] == whole["parameters"], (first, then, name)


@pytest.mark.parametrize("section", ["activations", "optimizer"])
def test_a_directory_that_one_rank_lacks_stops_all_with_its_message(
    start: Start, spill_dir: Path, section: str
) -> None:
    config = with_offload(config_of(2), spill_dir, "ssd")
    config["offload"][section]["path"] = [str(spill_dir), str(spill_dir / "absent")]
    found = start(2, {"case": {"config": config, "fails": True, "directory_of_rank": section}})
    assert found[0]["case"]["error"].startswith("RuntimeError: rank 1 cannot apply its plan")
    assert "absent" in found[0]["case"]["error"]
    assert "absent" in found[1]["case"]["error"]
