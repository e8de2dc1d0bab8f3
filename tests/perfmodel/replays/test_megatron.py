"""Megatron-LM's published runs: their steps, and what their activations would ask of drives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from perfmodel.cluster import simulate_cluster
from perfmodel.machine import read_machine
from perfmodel.replays.megatron import LIMIT_BYTES_PER_S, RUNS, Run

MACHINE = read_machine("a100-80gb-sxm")
LARGE = 140e9
YEAR_DAYS = 365

# Runs that have more GPUs from one to the next.
SERIES: dict[str, Callable[[Run], bool]] = {
    "larger models": lambda run: run.table == "table 1",
    "GPT-3 in ZeRO-3": lambda run: run.zero_stage == 3 and run.hidden == 12288,
    "MT-NLG in ZeRO-3": lambda run: run.zero_stage == 3 and run.hidden == 20480,
    "GPT-3 in a pipeline": lambda run: run.table == "table 2" and run.pipeline == 12,
    "MT-NLG in a pipeline": lambda run: run.table == "table 2" and run.pipeline == 35,
}


def test_models_are_as_large_as_published() -> None:
    published = [1.7, 3.6, 7.5, 18.4, 39.1, 76.1, 145.6, 310.1, 529.6, 1008.0]
    found = [run.model.num_params / 1e9 for run in RUNS if run.table == "table 1"]
    assert found == pytest.approx(published, abs=0.051)


def test_training_takes_the_days_that_are_published() -> None:
    # 300 billion tokens: GPT-3 in ZeRO-3 and in a pipeline, on 384 GPUs.
    days = [
        300e9 / (run.batch * 2048) * run.step_s / 86400
        for run in RUNS
        if run.table == "table 2" and run.gpus == 384
    ]
    assert days == pytest.approx([90, 84], abs=1)


def test_no_large_system_needs_more_than_the_published_bandwidth() -> None:
    large = [run for run in RUNS if run.model.num_params > LARGE]
    assert len(large) == 16
    assert all(run.write_bytes_per_s <= LIMIT_BYTES_PER_S for run in large)


@pytest.mark.parametrize("name", SERIES)
def test_bandwidth_falls_as_the_system_grows(name: str) -> None:
    runs = [run for run in RUNS if SERIES[name](run)]
    assert len(runs) >= 3
    for one, other in pairwise(runs):
        assert one.gpus < other.gpus
        assert one.write_bytes_per_s > other.write_bytes_per_s


def test_drives_last_two_years_only_if_they_forget_in_a_day() -> None:
    for run in RUNS:
        if run.model.num_params > LARGE:
            assert run.life_days(relaxed=True) > 2 * YEAR_DAYS
            assert run.life_days() < 100


@pytest.mark.parametrize("run", [run for run in RUNS if run.pipeline > 1], ids=lambda run: run.name)
def test_steps_in_pipelines_are_predicted(run: Run) -> None:
    found = simulate_cluster(run.workload(), MACHINE, recompute=True)
    assert found.step_s == pytest.approx(run.step_s, rel=0.1)


def test_simulated_systems_need_less_as_they_grow() -> None:
    for name in ("GPT-3 in ZeRO-3", "GPT-3 in a pipeline", "MT-NLG in a pipeline"):
        rates = [
            simulate_cluster(run.workload(sequence=True, fused_attention=True), MACHINE)
            for run in RUNS
            if SERIES[name](run)
        ]
        for one, other in pairwise(rates):
            assert one.write_bytes_per_s > other.write_bytes_per_s
