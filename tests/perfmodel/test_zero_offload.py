"""A step of ZeRO-3 with states on the host, against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perfmodel.machine import read_machine
from perfmodel.model import Model
from perfmodel.schedules.updates import UpdateRates, ratio_schedule, stride_schedule
from perfmodel.workload import Parallel, Workload
from perfmodel.zero_offload import FlushCosts, Iteration, simulate_iteration

MACHINE = read_machine("dos-h100")
MODEL = Model(num_layers=4, hidden_size=1024, num_heads=8, vocab_size=1000, max_positions=512)
WORKLOAD = Workload(
    model=MODEL, seq_len=512, parallel=Parallel(data=4, zero_stage=3), framework="deepspeed"
)
SIZES = (1_000_000,) * (MODEL.num_params // 4_000_000)
RATES = UpdateRates(
    device_params_per_s=7e10,
    host_params_per_s=2e9,
    to_device_bytes_per_s=5e10,
    to_host_bytes_per_s=5e10,
)
COSTS = FlushCosts(converted_params_per_s=1e9, step_s=0.25, layer_s=0.5)


def step(stride: int = 0, *, blocking: bool, workload: Workload = WORKLOAD) -> Iteration:
    schedule = stride_schedule(SIZES, stride)
    return simulate_iteration(workload, MACHINE, schedule, RATES, COSTS, blocking=blocking)


def test_a_blocking_flush_takes_all_its_time() -> None:
    waiting = step(blocking=True)
    free = step(stride=1, blocking=True)  # all are updated on the device
    flushed_s = sum(SIZES) / COSTS.converted_params_per_s
    assert waiting.backward_s - free.backward_s == pytest.approx(flushed_s, rel=0.05)


def test_a_flush_that_nobody_waits_for_hides_behind_the_backward() -> None:
    slow = replace(WORKLOAD, micro_batch=32)
    hidden, none = (step(stride, blocking=False, workload=slow) for stride in (0, 1))
    last_s = sum(SIZES) * 4 / 46e9
    assert hidden.backward_s < none.backward_s + last_s / 2


def test_gradients_of_what_is_resident_stay() -> None:
    half = ratio_schedule(SIZES, 0.5)
    found = simulate_iteration(WORKLOAD, MACHINE, half, RATES, COSTS, blocking=True)
    whole, none = step(blocking=True), step(stride=1, blocking=True)
    middle = (whole.backward_s + none.backward_s) / 2
    assert found.backward_s == pytest.approx(middle, rel=0.1)
    assert found.update_s < whole.update_s


def test_what_a_step_takes_beside_is_of_the_step_and_its_layers() -> None:
    found = step(blocking=True)
    assert found.other_s == COSTS.step_s + MODEL.num_layers * COSTS.layer_s
    parts = found.forward_s + found.backward_s + found.update_s + found.other_s
    assert found.iteration_s == parts


def test_gradients_are_flushed_once_a_step() -> None:
    once = step(blocking=True)
    free = step(stride=1, blocking=True)
    four = step(blocking=True, workload=replace(WORKLOAD, accumulation=4))
    assert four.forward_s == pytest.approx(4 * once.forward_s)
    assert four.backward_s == pytest.approx(once.backward_s + 3 * free.backward_s)
    assert four.update_s == once.update_s


def test_a_slow_network_is_waited_for() -> None:
    slow = replace(MACHINE, network_bytes_per_s=1e9)
    schedule = stride_schedule(SIZES, 2)
    found = simulate_iteration(WORKLOAD, slow, schedule, RATES, COSTS, blocking=False)
    gathered = MODEL.num_params * 2 * 3 / 4
    assert found.forward_s >= gathered / 1e9
    assert found.backward_s >= 2 * gathered / 1e9, "gathered again, and reduced"


def test_other_ways_to_share_are_refused() -> None:
    for parallel in (Parallel(data=4, zero_stage=2), Parallel(data=2, zero_stage=3, tensor=2)):
        with pytest.raises(ValueError, match=f"zero_stage={parallel.zero_stage}"):
            step(blocking=True, workload=replace(WORKLOAD, parallel=parallel))
    with pytest.raises(ValueError, match="network_bytes_per_s=0"):
        simulate_iteration(
            WORKLOAD,
            replace(MACHINE, network_bytes_per_s=0.0),
            stride_schedule(SIZES, 2),
            RATES,
            COSTS,
            blocking=True,
        )
    for wrong in ({"converted_params_per_s": 0.0}, {"converted_params_per_s": 1.0, "step_s": -1.0}):
        with pytest.raises(ValueError, match="too small"):
            FlushCosts(**wrong)
