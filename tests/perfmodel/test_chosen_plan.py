"""A plan has the room that was planned for, and what may be written in a day, shared out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perfmodel.chosen_plan import plan_of
from perfmodel.machine import read_machine
from perfmodel.plain_models import plain_model
from perfmodel.plan_file import Limits
from perfmodel.prediction import Prediction, predict
from perfmodel.workload import Parallel, Strategy, Workload

MACHINE = read_machine("rtx-4090")
MODEL = plain_model("gpt", num_layers=4, hidden_size=512, num_heads=8, seq_len=512)
WORKLOAD = Workload(model=MODEL, seq_len=512, micro_batch=8, accumulation=2, plain="gpt")


def predicted(**chosen: object) -> Prediction:
    return predict(WORKLOAD, Strategy(**chosen), MACHINE)  # type: ignore[arg-type]


def held(prediction: Prediction, tier: str, *, activations: bool) -> int:
    return sum(
        each.nbytes
        for each in prediction.held
        if each.tier == tier and (each.name == "activations") is activations
    )


def test_activations_on_the_host_may_take_what_was_predicted_and_little_more() -> None:
    found = predicted(activations="host", placement="device")
    offload = plan_of(found, MACHINE).activations.offload
    assert offload is not None
    nbytes = held(found, "host", activations=True)
    assert nbytes > 0
    assert nbytes <= (offload.host_bytes or 0) <= 1.2 * nbytes


def test_each_part_on_the_ssd_may_take_what_was_predicted_of_it() -> None:
    found = predicted(activations="ssd", placement="ssd")
    plan = plan_of(found, MACHINE, path=("/nvme",))
    assert plan.activations.offload is not None
    assert plan.optimizer is not None
    for section, activations in ((plan.activations.offload, True), (plan.optimizer, False)):
        nbytes = held(found, "ssd", activations=activations)
        assert nbytes > 0
        assert nbytes <= (section.spill_bytes or 0) <= 1.2 * nbytes
        assert section.ssd_write_bytes_per_day is None


@pytest.mark.parametrize("devices", [1, 2])
def test_what_may_be_written_in_a_day_is_shared_by_what_is_written(devices: int) -> None:
    shared = replace(WORKLOAD, parallel=Parallel(data=devices))
    machine = replace(MACHINE, devices=4, network_bytes_per_s=1e11)
    strategy = Strategy(activations="ssd", placement="ssd")
    found = predict(shared, strategy, replace(machine, devices=devices))
    limits = Limits(ssd_write_bytes_per_day=10**15)
    plan = plan_of(found, machine, path=("/nvme",), limits=limits)
    assert plan.activations.offload is not None
    assert plan.optimizer is not None
    moved = plan.activations.offload.ssd_write_bytes_per_day or 0
    states = plan.optimizer.ssd_write_bytes_per_day or 0
    assert moved + states == pytest.approx(10**15 / devices)
    # Moments and master copies, of half precision parameters, once a step.
    assert states / (moved + states) == pytest.approx(
        12 * MODEL.num_params / found.ssd_write_bytes, rel=0.01
    )
