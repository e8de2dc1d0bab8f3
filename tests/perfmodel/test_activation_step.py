"""What becomes of activations: more memory is never slower, and moving never costs memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perfmodel.activation_step import (
    ActivationStep,
    UnderWay,
    activation_step,
    of_each,
    run_again,
    staged,
    under_way,
)
from perfmodel.layers import tape_of
from perfmodel.machine import Machine, read_machine
from perfmodel.operator_times import OperatorTimes, operator_times
from perfmodel.plain_models import PLAIN_MODELS, plain_model, plain_shape
from perfmodel.tape import Tape
from perfmodel.workload import Strategy

MACHINE = read_machine("laptop")
LEAST = 1 << 12


def step_of(kind: str, machine: Machine = MACHINE) -> tuple[Tape, OperatorTimes]:
    model = plain_model(kind, num_layers=4, hidden_size=256, num_heads=4, seq_len=128)
    tape = tape_of(model, plain_shape(kind, batch=4, seq_len=128))
    return tape, operator_times(tape.operators, machine.device, "float32")


def found(kind: str, machine: Machine = MACHINE, **chosen: object) -> ActivationStep:
    strategy = replace(Strategy(min_tensor_bytes=LEAST, staging_bytes=8 << 20), **chosen)
    return activation_step(*step_of(kind, machine), machine, strategy)


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_running_again_takes_time_and_frees_memory(kind: str) -> None:
    kept, again = found(kind), found(kind, activations="recompute")
    some = found(kind, activations="recompute", recompute=(0, 1))
    assert again.device_bytes < some.device_bytes < kept.device_bytes
    assert again.recompute_s > some.recompute_s > 0 == kept.recompute_s
    assert again.recompute_s < kept.forward_s


@pytest.mark.parametrize("kind", PLAIN_MODELS)
@pytest.mark.parametrize("tier", ["host", "ssd"])
def test_what_leaves_without_a_limit_makes_nobody_wait(kind: str, tier: str) -> None:
    kept, moved = found(kind), found(kind, activations=tier)
    assert moved.device_bytes <= kept.device_bytes
    assert moved.moved_bytes > 0
    assert moved.stall_s < 0.01 * kept.duration_s


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_a_lower_limit_moves_more_and_is_never_faster(kind: str) -> None:
    slow = replace(
        MACHINE,
        drive=replace(
            MACHINE.drive, write_bytes_per_s=2e8, read_bytes_per_s=2e8, mixed_bytes_per_s=2e8
        ),
    )
    kept = found(kind, slow).device_bytes
    steps = [
        found(kind, slow, activations="ssd", memory_bytes=int(kept * part))
        for part in (0.9, 0.6, 0.3)
    ]
    assert steps[0].moved_bytes < steps[1].moved_bytes < steps[2].moved_bytes
    assert steps[0].device_bytes > steps[1].device_bytes > steps[2].device_bytes
    assert steps[0].stall_s <= steps[1].stall_s <= steps[2].stall_s
    assert steps[2].stall_s > 0


def test_without_a_link_staging_is_the_devices_and_copies_hold_up_its_processor() -> None:
    alone = replace(MACHINE, link=None, drive=replace(MACHINE.drive, processor_bytes_per_s=1e9))
    moved = found("gpt", alone, activations="ssd")
    assert moved.staging_bytes == 0
    assert moved.processor_s == pytest.approx(2 * moved.ssd_bytes / 1e9 / alone.host.cores)
    assert moved.schedule is not None
    count = sum(tier == "ssd" for tier in moved.schedule.tiers)
    beside = replace(alone.drive, beside_bytes_per_s=2e9, beside_s=1e-3)
    measured = found("gpt", replace(alone, drive=beside), activations="ssd")
    assert measured.processor_s == pytest.approx(measured.ssd_bytes / 1e9 + 1e-3 * count)


def test_a_pipelines_stages_take_as_long_as_the_slower_and_as_much_as_the_larger() -> None:
    head = ActivationStep(forward_s=2, backward_s=4, device_bytes=90, saved_bytes=60, ssd_bytes=5)
    for stall_s, duration_s in ((0.5, 6), (4, 7)):
        first = ActivationStep(
            forward_s=1, backward_s=2, stall_s=stall_s, device_bytes=30, saved_bytes=20, ssd_bytes=9
        )
        both = staged(head, first)
        assert both.duration_s == duration_s
        assert both.moved_bytes == both.written_bytes == 9
        assert under_way(both, (3.0, 1.0)) == UnderWay(90, 0, 27)
        assert under_way(both, (5.0, 1.0)) == UnderWay(30 + 4 * 20, 0, 45)
        assert under_way(both, (5.0, 3.0)) == UnderWay(90 + 2 * 20, 0, 45)


def test_each_forward_under_way_has_its_part_of_the_memory() -> None:
    assert of_each(Strategy(memory_bytes=100), 4.0).memory_bytes == 25
    assert of_each(Strategy(), 4.0).memory_bytes is None


@pytest.mark.parametrize("kind", PLAIN_MODELS)
@pytest.mark.parametrize("part", [0.3, 0.6, 2.0])
def test_without_a_link_a_run_fills_its_limit_and_staging_comes_on_top(
    kind: str, part: float
) -> None:
    alone = replace(MACHINE, link=None)
    kept = found(kind, alone)
    room = int(part * kept.saved_bytes)
    moved = found(kind, alone, activations="ssd", memory_bytes=room)
    beside = kept.device_bytes - kept.saved_bytes
    staging = 8 << 20
    # At the worst moment of a step that keeps all, nearly all of it is saved.
    filled = beside + min(room, kept.saved_bytes)
    assert 0.9 * filled <= moved.device_bytes - staging <= kept.device_bytes


def test_what_a_machine_lacks_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"activations='ssd' needs a drive, and 'laptop' has none"):
        found("gpt", replace(MACHINE, drive=None), activations="ssd")
    with pytest.raises(ValueError, match=r"activations='host' would save nothing on 'laptop'"):
        found("gpt", replace(MACHINE, link=None), activations="host")


def test_what_ends_with_saving_its_input_is_not_computed_again() -> None:
    tape, _ = step_of("gpt")
    again = run_again(tape, 1)
    # The last map of a layer saves what it reads, and neither it nor the sum behind it is run.
    behind = tape.operators[again.stop]
    assert behind.name == "linear"
    assert behind.saves == behind.reads
    assert not any(tape.operators[at].saves for at in range(again.stop + 1, tape.blocks[1].stop))
    bert, _ = step_of("bert")
    last = bert.operators[run_again(bert, 1)[-1]]
    assert last.name == "layer norm"  # which keeps what it has made
