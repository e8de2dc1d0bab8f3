"""Configs for DeepSpeed, and the start of its ranks, for the tests beside this file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["ADAMW", "ROOT", "Ran", "Start", "config_of", "started", "with_offload"]

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("deepspeed_run.py")
ADAMW = {"lr": 1e-3, "weight_decay": 0.1}
Ran = list[dict[str, Any]]
"""Of each rank what its cases came to, by name."""
Start = Callable[..., Ran]


def started(place: Path, ranks: int, cases: dict[str, Any]) -> Ran:
    """Train all cases, in processes of their own for the ranks; `place` is an empty directory."""
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
