"""Megatron's checkpoints (`sharded_state_dict`) with the plan's optimizer: both ways, and fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from tests.offload.integrations.test_megatron import plan_of, started

FORMATS = ("dp_reshardable", "fully_reshardable")
STOCK = {"version": 1}
"""A plan that leaves Megatron its own optimizer."""


def kinds() -> dict[str, dict[str, Any]]:
    """Return one case for each optimizer, precision and format."""
    found: dict[str, dict[str, Any]] = {}
    for bf16 in (False, True):
        case = {"model": "gpt", "bf16": bf16, "states": True}
        found[f"{bf16} whole"] = case
        for kind in FORMATS:
            found[f"{bf16} {kind}"] = {**case, "distributed": True, "format": kind}
    experts = {
        "num_moe_experts": 2,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "add_bias_linear": False,
        "moe_token_dispatcher_type": "allgather",
    }
    found["experts"] = {"model": "gpt", "states": True, "distributed": True, "config": experts}
    return found


def test_a_run_goes_on_to_the_same_bits(tmp_path: Path, spill_dir: Path) -> None:
    plan, cases = plan_of(spill_dir), dict[str, Any]()
    names = [(name, False) for name in kinds()]
    # Steps counted as with Transformer Engine, of which only the distributed optimizer knows.
    names += [
        (name, True) for name, case in kinds().items() if case.get("bf16") and "format" in case
    ]
    for name, fused in names:
        own = {**kinds()[name], "plan": plan, "fused": fused}
        made = str(tmp_path / f"{name} {fused}")
        cases[f"{name} {fused} whole"] = {**own, "steps": 4}
        cases[f"{name} {fused} begun"] = {**own, "save": made}
        cases[f"{name} {fused} resumed"] = {**own, "load": made, "first": 2}
    for rank in started(tmp_path, 2, cases):
        for name, fused in names:
            whole, begun, resumed = (
                rank[f"{name} {fused} {part}"] for part in ("whole", "begun", "resumed")
            )
            for part in (whole, begun, resumed):
                assert "error" not in part, (name, fused, part["trace"])
            assert resumed["losses"] == whole["losses"][2:], (name, fused)
            assert resumed["parameters"] == whole["parameters"], (name, fused)
            assert resumed["states"] == whole["states"], (name, fused)
            assert whole["states"][1] == [4.0]


def test_stock_megatron_reads_ours_and_ours_reads_its(tmp_path: Path, spill_dir: Path) -> None:
    plan = plan_of(spill_dir)
    cases: dict[str, Any] = {}
    for name, case in kinds().items():
        its, ours = str(tmp_path / f"{name} its"), str(tmp_path / f"{name} ours")
        cases[f"{name} its"] = {**case, "plan": STOCK, "save": its}
        cases[f"{name} ours"] = {**case, "plan": plan, "load": its, "save": ours, "steps": 0}
        if case.get("format") != "fully_reshardable":
            # Which Megatron's own, without Transformer Engine, saves and does not read.
            again = {**case, "plan": STOCK, "first": 2, "warm": True}
            cases[f"{name} own"] = {**again, "load": its}
            cases[f"{name} back"] = {**again, "load": ours}
    for rank in started(tmp_path, 2, cases):
        for name in kinds():
            parts = [rank[key] for key in cases if key.startswith(f"{name} ")]
            for part in parts:
                assert "error" not in part, (name, part["trace"])
            its, ours, *again = parts
            assert ours["states"] == its["states"], name
            assert ours["parameters"] == its["parameters"], name
            for part in ("losses", "parameters", "states") if again else ():
                own, back = (each[part] for each in again)
                assert back == own, name
