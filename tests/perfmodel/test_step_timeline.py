"""A step as an event graph takes as long, and as much memory, as is predicted without one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from perfmodel.machine import Machine, read_machine
from perfmodel.plain_models import PLAIN_MODELS, plain_model
from perfmodel.prediction import predict
from perfmodel.states import held_bytes
from perfmodel.step_timeline import StepTimeline, step_timeline
from perfmodel.workload import Strategy, Workload

GPU = read_machine("rtx-4090")
ALONE = replace(read_machine("laptop"), link=None)


def workload(kind: str = "gpt") -> Workload:
    model = plain_model(kind, num_layers=4, hidden_size=512, num_heads=8, seq_len=512)
    return Workload(model=model, seq_len=512, micro_batch=8, dtype="float32", plain=kind)


def peak(found: StepTimeline) -> int:
    return max(level.nbytes for level in found.levels)


def tensor_peak(strategy: Strategy, machine: Machine, kind: str) -> int:
    held = predict(workload(kind), strategy, machine).held
    return max(held_bytes(held, "device", phase) for phase in ("backward", "update"))


@pytest.mark.parametrize("machine", [GPU, ALONE], ids=["gpu", "alone"])
@pytest.mark.parametrize("kind", PLAIN_MODELS)
@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_without_moves_time_and_peak_are_exactly_those_predicted(
    mode: str, kind: str, machine: Machine
) -> None:
    strategy = Strategy(activations=mode, placement="device")
    found = step_timeline(workload(kind), strategy, machine)
    predicted = predict(workload(kind), strategy, machine)
    assert found.duration_s == pytest.approx(predicted.step_s)
    assert found.waited_s == pytest.approx(0, abs=1e-9)
    assert peak(found) == tensor_peak(strategy, machine, kind)


@pytest.mark.parametrize("early", [False, True])
def test_gradients_that_leave_early_do_so_beside_the_backward(early: bool) -> None:
    strategy = Strategy(placement="host", early_gradients=early)
    found = step_timeline(workload(), strategy, GPU)
    assert found.duration_s == pytest.approx(predict(workload(), strategy, GPU).step_s)
    [sent] = (each for each in found.spans if each.what == "gradients")
    ended_s = max(each.end_s for each in found.spans if each.what == "backward")
    assert (sent.begin_s < ended_s) is early


@pytest.mark.parametrize("kind", PLAIN_MODELS)
@pytest.mark.parametrize("tier", ["host", "ssd"])
def test_what_moves_goes_out_and_back_and_time_and_peak_are_about_those_predicted(
    tier: str, kind: str
) -> None:
    strategy = Strategy(activations=tier, placement="device", staging_bytes=1 << 30)
    found = step_timeline(workload(kind), strategy, GPU)
    predicted = predict(workload(kind), strategy, GPU)
    assert found.duration_s == pytest.approx(predicted.step_s, rel=0.05)
    # The prediction has copies in their whole window at the worst moment.
    most = tensor_peak(strategy, GPU, kind)
    assert 0.85 * most <= peak(found) <= most
    out, back = ("ssd write", "ssd read") if tier == "ssd" else ("to host", "to device")
    moved_bytes = predicted.ssd_write_bytes if tier == "ssd" else predicted.host_bytes
    assert moved_bytes
    for resource in (out, back):
        assert any((each.resource, each.what) == (resource, "activations") for each in found.spans)
    assert found.levels[-1].moving_bytes == 0


def test_a_limit_that_makes_the_step_wait_is_seen_as_waiting() -> None:
    free = Strategy(activations="ssd", placement="device", staging_bytes=1 << 30)
    slow = replace(GPU, drive=replace(GPU.drive, read_bytes_per_s=2e8, write_bytes_per_s=2e8))
    tight = replace(free, memory_bytes=64 << 20)
    held_up = step_timeline(workload(), tight, slow)
    assert held_up.waited_s > 0
    assert held_up.duration_s == pytest.approx(predict(workload(), tight, slow).step_s, rel=0.1)
    assert step_timeline(workload(), free, GPU).waited_s == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("tier", ["host", "ssd"])
@pytest.mark.parametrize("mib", [64, 128, 256])
def test_a_limit_of_what_is_saved_is_kept_by_waiting(tier: str, mib: int) -> None:
    strategy = Strategy(
        activations=tier, placement="device", staging_bytes=1 << 30, memory_bytes=mib << 20
    )
    found = step_timeline(workload(), strategy, GPU)
    assert peak(found) <= 1.02 * tensor_peak(strategy, GPU, "gpt")


@pytest.mark.parametrize("placement", ["device", "host", "ssd"])
def test_nothing_overlaps_itself_and_all_of_it_is_within_the_step(placement: str) -> None:
    strategy = Strategy(activations="ssd", placement=placement, staging_bytes=1 << 30)
    found = step_timeline(workload(), strategy, GPU)
    for resource in {span.resource for span in found.spans}:
        mine = sorted(
            (each.begin_s, each.end_s) for each in found.spans if each.resource == resource
        )
        assert all(one[1] <= other[0] * (1 + 1e-9) + 1e-12 for one, other in pairwise(mine))
        assert mine[-1][1] <= found.duration_s
    times = [level.at_s for level in found.levels]
    assert times == sorted(times)
    assert min(level.moving_bytes for level in found.levels) >= 0
