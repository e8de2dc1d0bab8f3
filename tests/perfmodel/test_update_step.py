"""Updates by where states lie: rates as given, transfers as many bytes as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perfmodel.machine import read_machine
from perfmodel.model import Model
from perfmodel.update_step import update_step
from perfmodel.workload import Parallel, Strategy, Workload

MACHINE = replace(read_machine("h100-sxm"), devices=1)
MODEL = Model(num_layers=4, hidden_size=256, num_heads=4, vocab_size=1000, max_positions=128)
WORKLOAD = Workload(model=MODEL, seq_len=128)
COUNT = MODEL.num_params


def test_the_host_updates_at_its_rate_and_gradients_cross_once() -> None:
    found = update_step(WORKLOAD, Strategy(placement="host", update_schedule="host"), MACHINE)
    assert found.update_s >= COUNT / MACHINE.host.update_params_per_s
    assert MACHINE.link is not None
    assert found.gradients_s == pytest.approx(2 * COUNT / MACHINE.link.to_host_bytes_per_s)
    assert found.ssd_bytes == 0


def test_a_planned_share_is_never_slower_than_none_or_all() -> None:
    seconds = {
        schedule: update_step(
            WORKLOAD, Strategy(placement="host", update_schedule=schedule), MACHINE
        ).update_s
        for schedule in ("auto", "host", "device")
    }
    assert seconds["auto"] <= min(seconds["host"], seconds["device"])


def test_what_lies_on_the_ssd_is_read_and_written_once() -> None:
    found = update_step(WORKLOAD, Strategy(placement="ssd"), MACHINE)
    assert found.ssd_bytes == 12 * COUNT
    assert MACHINE.drive is not None
    assert found.update_s >= 24 * COUNT / MACHINE.drive.mixed_bytes_per_s
    half = update_step(WORKLOAD, Strategy(placement="ssd=0.5,host=0.5"), MACHINE)
    assert half.ssd_bytes == pytest.approx(6 * COUNT, rel=0.01)


def test_fp32_parameters_on_a_processor_are_their_own_master_copies() -> None:
    alone = replace(MACHINE, link=None)
    found = update_step(replace(WORKLOAD, dtype="float32"), Strategy(placement="ssd"), alone)
    assert found.ssd_bytes == 8 * COUNT


def test_ranks_that_share_states_update_a_part_each() -> None:
    strategy = Strategy(placement="host", update_schedule="host")
    four = replace(WORKLOAD, parallel=Parallel(data=4, zero_stage=1))
    one, part = (update_step(each, strategy, MACHINE) for each in (WORKLOAD, four))
    assert part.update_s == pytest.approx(one.update_s / 4, rel=0.1)


def test_a_machine_without_a_drive_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'h100-sxm' has no drive"):
        update_step(WORKLOAD, Strategy(placement="ssd"), replace(MACHINE, drive=None))
