"""Checkpoints of DeepSpeed with states that ours moved: read by anyone, at any number of ranks."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.offload.integrations.deepspeed_cases import ADAMW, Start, config_of, with_offload

pytest.importorskip("deepspeed")

GOES = [
    ("moved", "host"),
    ("moved", "kept"),
    ("kept", "moved"),
    ("torch", "moved"),
    ("moved", "torch"),
]
"""Who saves, and who goes on."""


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


@pytest.mark.parametrize(("saving", "loading"), [(2, 1), (1, 2)])
def test_a_universal_checkpoint_is_gone_on_from_at_another_number_of_ranks(
    start: Start, spill_dir: Path, tmp_path: Path, saving: int, loading: int
) -> None:
    stages = (1, 2, 3)
    ways = {
        "kept": lambda config: {"config": config, "stock": True, "client": ADAMW},
        "moved": lambda config: {"config": with_offload(config, spill_dir, "ssd")},
    }
    begun = {
        f"{way} {stage}": ways[way](config_of(stage))
        | {"steps": 2, "save": str(tmp_path / f"{way} {stage}"), "universal": True}
        for way, stage in itertools.product(ways, stages)
    }
    for name, rank in ((name, rank) for rank in start(saving, begun) for name in begun):
        assert "error" not in rank[name], rank[name]["trace"]
    convert([tmp_path / name for name in begun])
    cases = {}
    for first, then, stage in itertools.product(ways, ways, stages):
        config = config_of(stage) | {"checkpoint": {"load_universal": True}}
        resumed = {"steps": 2, "resume": str(tmp_path / f"{first} {stage}")}
        cases[f"{first} to {then} {stage}"] = ways[then](config) | resumed
    found = start(loading, cases)[0]
    for name, each in found.items():
        assert "error" not in each, (name, each["trace"])
    for stage in stages:
        for goes in ("kept to moved", "moved to kept", "moved to moved"):
            one, other = found[f"{goes} {stage}"], found[f"kept to kept {stage}"]
            assert one["losses"] == other["losses"], (goes, stage)
            assert one["parameters"] == other["parameters"], (goes, stage)


CONVERSION = """
import sys
from deepspeed.checkpoint import ds_to_universal
for directory in sys.argv[1:]:
    tag = open(f"{directory}/latest").read()
    sys.argv[1:] = ["--input_folder", f"{directory}/{tag}"]
    sys.argv += ["--output_folder", f"{directory}/{tag}_universal"]
    sys.argv += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    ds_to_universal.main(ds_to_universal.parse_arguments())
"""


def convert(directories: Sequence[Path]) -> None:
    """Write universal checkpoints beside ordinary ones, by DeepSpeed's own program."""
    command = [sys.executable, "-c", CONVERSION, *map(str, directories)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_zero_to_fp32_finds_the_parameters(start: Start, spill_dir: Path, tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        f"{stage}": {
            "config": with_offload(config_of(stage), spill_dir, "ssd"),
            "save": str(tmp_path / f"{stage}"),
            "fp32": True,
        }
        for stage in (1, 2, 3)
    }
    for rank in start(2, cases):
        for name, each in rank.items():
            assert "error" not in each, (name, each["trace"])
            assert each["fp32"] == each["parameters"], name
