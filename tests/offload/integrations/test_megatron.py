"""Megatron-core's real schedules, DDP and optimizers by a plan: the bits of no offload.

All cases of a number of ranks run in one start of them.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("megatron_run.py")

Ran = list[dict[str, Any]]
"""Of each rank what its cases came to, by name."""


def started(place: Path, ranks: int, cases: dict[str, Any]) -> Ran:
    """Train all cases, in processes of their own for the ranks."""
    place = place / "run"
    place.mkdir()
    (place / "cases.json").write_text(json.dumps({"cases": cases}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", str(PROGRAM)]
    command += [str(place / "cases.json"), str(place / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((place / f"out.{rank}.json").read_text()) for rank in range(ranks)]


def plan_of(directory: Path) -> dict[str, Any]:
    """Return a plan with activations and states on the SSD."""
    path = [str(directory)]
    states = {"placement": "ssd", "path": path, "subgroup_params": 500, "staging_bytes": 1 << 20}
    moved = {"mode": "ssd", "path": path, "min_tensor_bytes": 256, "staging_bytes": 1 << 20}
    return {"version": 1, "activations": moved, "optimizer": states}


def both_ways(cases: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return each case without a plan and with one."""
    plan = plan_of(directory)
    return {f"kept {name}": case for name, case in cases.items()} | {
        f"moved {name}": case | {"plan": plan} for name, case in cases.items()
    }


def require_same(found: dict[str, Any], names: Any) -> None:
    """Fail unless losses, gradients and parameters are those of no offload."""
    for name in names:
        kept, moved = found[f"kept {name}"], found[f"moved {name}"]
        assert "error" not in kept, (name, kept["trace"])
        assert "error" not in moved, (name, moved["trace"])
        for key in ("losses", "gradients", "parameters"):
            assert moved[key] == kept[key], (name, key)


def cases_of(**more: Any) -> dict[str, Any]:
    """Return a case for each model, precision and optimizer."""
    found = {}
    for model, bf16, distributed in itertools.product(
        ("gpt", "bert", "t5"), (False, True), (False, True)
    ):
        name = f"{model} {'bf16' if bf16 else 'fp32'} {'distributed' if distributed else ''}"
        found[name] = {"model": model, "bf16": bf16, "distributed": distributed, **more}
    return found


def test_one_rank_has_the_bits_of_no_offload(tmp_path: Path, spill_dir: Path) -> None:
    cases = cases_of()
    stock = {f"stock {name}": case | {"plan": {"version": 1}} for name, case in cases.items()}
    [found] = started(tmp_path, 1, stock | both_ways(cases, spill_dir))
    for name in cases:  # whose optimizer rounds in another order
        norms = found[f"stock {name}"]["norms"]
        assert found[f"kept {name}"]["norms"] == pytest.approx(norms, rel=1e-5), name
    require_same(found, cases)
    assert all(found[f"moved {name}"]["offloaded"] > 0 for name in cases)
    for name in cases:
        assert found[f"moved {name}"]["offloaded"] > 0, name
    assert [each.name for each in spill_dir.iterdir()] in ([], ["run"])


def test_two_ranks_of_data_and_of_tensors_have_the_bits_of_no_offload(
    tmp_path: Path, spill_dir: Path
) -> None:
    found = cases_of()
    data = {name: case for name, case in found.items() if not case["bf16"]}
    tensor = {
        f"tensor {name}": case | {"tensor": 2} for name, case in found.items() if case["bf16"]
    }
    sequence = {"sequence_parallel": True}
    cases = {**data, **tensor}
    for bf16 in (False, True):
        case = {"model": "gpt", "tensor": 2, "bf16": bf16, "distributed": True, "config": sequence}
        cases[f"sequence {bf16}"] = case
    for rank in started(tmp_path, 2, both_ways(cases, spill_dir)):
        require_same(rank, cases)
        assert all(rank[f"moved {name}"]["offloaded"] > 0 for name in cases)


def test_pipelines_have_the_bits_of_no_offload(tmp_path: Path, spill_dir: Path) -> None:
    cases: dict[str, Any] = {}
    for bf16, chunks, count in itertools.product((False, True), (1, 2), (2, 4, 6)):
        case = {"model": "gpt", "pipeline": 2, "chunks": chunks, "micro_batches": count}
        cases[f"gpt {bf16} {chunks} {count}"] = case | {"bf16": bf16}
    for bf16, distributed in itertools.product((False, True), (False, True)):
        more = {"bf16": bf16, "distributed": distributed, "pipeline": 2, "micro_batches": 4}
        for model in ("bert", "t5"):  # a stage for the encoder, and one for the decoder
            cases[f"{model} {bf16} {distributed}"] = {"model": model, **more}
    ranks = started(tmp_path, 2, both_ways(cases, spill_dir))
    for rank in ranks:
        require_same(rank, cases)
        # As was expected of the schedule, pass by pass.
        assert not [name for name in cases if rank[f"moved {name}"]["surprised"]]
    # The last rank keeps a forward that its own backward follows.
    assert all(ranks[0][f"moved {name}"]["offloaded"] > 0 for name in cases)
    assert all(ranks[1][f"moved {name}"]["offloaded"] == 0 for name in cases if " 1 " in name)


def test_recomputing_and_experts_have_the_bits_of_no_offload(
    tmp_path: Path, spill_dir: Path
) -> None:
    whole = {"recompute_method": "uniform", "recompute_num_layers": 1}
    configs: dict[str, dict[str, Any]] = {
        "full": {"recompute_granularity": "full", **whole},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        # Whose outputs' storages are emptied after the forward, and filled again.
        "layernorm": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
        "experts": {
            "num_moe_experts": 2,
            "moe_router_topk": 1,
            "moe_router_pre_softmax": True,
            "add_bias_linear": False,
            "moe_token_dispatcher_type": "allgather",
        },
    }
    cases = {name: {"model": "gpt", "config": config} for name, config in configs.items()}
    [found] = started(tmp_path, 1, both_ways(cases, spill_dir))
    require_same(found, cases)
    assert all(found[f"moved {name}"]["offloaded"] > 0 for name in cases)
