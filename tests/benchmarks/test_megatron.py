"""Tests of the benchmarks of Megatron: pipelines are simulated, and claims put together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.test_programs import record_of

pytest.importorskip("megatron.core")

from benchmarks import megatron
from benchmarks.megatron import Measured


def test_pipelines_says_what_a_plan_costs_and_spares(
    spill_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("record") / "pipelines.json"
    found = record_of("pipelines", spill_dir, out, "--model", "llama-2-7b")
    assert len(found["samples"]) == 23
    for steps in found["samples"].values():
        kept, moved = steps["keep"], steps["ssd"]
        assert kept["written_bytes"] == [0.0] * len(kept["device_bytes"])
        assert max(moved["written_bytes"]) > 0
        assert max(moved["device_bytes"]) < max(kept["device_bytes"])
    assert found["facts"]["at a limit"]["16 GiB"]["ssd"]["tokens_per_s"] > 0


def test_a_difference_of_bits_is_a_claim_that_is_missed() -> None:
    def measured(peak_bytes: float, bits: str) -> Measured:
        return Measured([1.0] * 6, peak_bytes, bits)

    ways = {
        "none": measured(100.0, "a"),
        "recompute": measured(60.0, "a"),
        "ssd": measured(50.0, "b"),
        "none again": measured(100.0, "a"),
    }
    larger = {name: measured(100.0, "a") for name in ("none, few", "ssd, all")}
    found = {**dict.fromkeys(megatron.MODELS, ways), "larger micro-batch": larger}
    record = megatron.make_record(found, {})
    by_name = {claim.name: claim for claim in record.claims}
    assert by_name["gpt: bits that differ"].met is False
    assert by_name["gpt: memory, ours / none"].met is True
    assert record.met is False
    json.dumps(record.as_json(["megatron.py"]))
