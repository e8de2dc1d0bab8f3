"""Plans: what is chosen fits, nothing that was tried is better, and what is missing is said."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.choices import Searched
from perfmodel.endurance import WriteBudget, needed_per_day
from perfmodel.layered_step import EFFORT
from perfmodel.machine import read_machine
from perfmodel.model import Model
from perfmodel.plain_models import PLAIN_MODELS, plain_model
from perfmodel.plan_file import Limits
from perfmodel.planner import Search, limits_of, plan
from perfmodel.prediction import Prediction, combined, predict
from perfmodel.workload import Parallel, Strategy, Workload

MODEL = Model(
    num_layers=16,
    hidden_size=1024,
    num_heads=16,
    vocab_size=8192,
    norm="rms",
    positions="rotary",
    gated=True,
    activation="silu",
    attention_bias=False,
    ffn_bias=False,
)
MACHINE = replace(read_machine("a100-80gb-sxm"), devices=1)
WORKLOAD = Workload(model=MODEL, seq_len=2048, micro_batch=4)
GIB = 1 << 30


def test_with_room_for_everything_nothing_moves() -> None:
    best = plan(WORKLOAD, MACHINE).choices[0]
    assert best.name == "fastest"
    assert best.prediction.strategy.activations == "keep"
    assert best.prediction.strategy.placement == "device"
    assert best.prediction.ssd_write_bytes == 0


@pytest.mark.parametrize("gib", [8, 12, 20, 40])
def test_what_is_chosen_keeps_to_every_limit(gib: int) -> None:
    limits = Limits(device_bytes=gib * GIB, host_bytes=64 * GIB, ssd_write_bytes_per_day=10**13)
    found = plan(WORKLOAD, MACHINE, limits)
    assert found.choices
    for choice in found.choices:
        prediction = choice.prediction
        assert prediction.device_bytes <= gib * GIB
        assert prediction.host_bytes <= 64 * GIB
        assert prediction.ssd_write_bytes_per_day <= 10**13
        assert choice.why


def test_what_fits_only_as_a_run_moves_it_is_chosen() -> None:
    model = plain_model("gpt", num_layers=6, hidden_size=512, num_heads=8, seq_len=256)
    workload = Workload(model=model, seq_len=256, micro_batch=8, dtype="float32", plain="gpt")
    laptop = replace(read_machine("laptop"), link=None)
    moved = Strategy(activations="ssd", optimizer="torch", staging_bytes=64 << 20)
    thorough = predict(workload, moved, laptop, effort=EFFORT)
    limits = Limits(device_bytes=round(1.01 * thorough.device_bytes))
    search = Search(optimizers=("torch",), micro_batches=(8,))
    best = plan(workload, laptop, limits, search).choices[0].prediction
    assert best.strategy.activations == "ssd"  # a quick search finds it to be over the limit
    assert best.step_s <= 1.005 * thorough.step_s


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_what_is_chosen_fits_as_thoroughly_as_a_run_searches(kind: str) -> None:
    model = plain_model(kind, num_layers=3, hidden_size=384, num_heads=6, seq_len=512)
    workload = Workload(model=model, seq_len=512, micro_batch=8, dtype="float32", plain=kind)
    alone = replace(MACHINE, link=None)
    kept = predict(workload, Strategy(optimizer="torch"), alone).device_bytes
    for part in range(40, 100, 8):
        limit = kept * part // 100
        search = Search(activations=("keep", "ssd"), micro_batches=(4, 8))
        for choice in plan(workload, alone, Limits(device_bytes=limit), search).choices:
            found = choice.prediction
            again = predict(found.workload, found.strategy, alone, effort=1.0)
            assert again.device_bytes <= limit, (choice.name, found.strategy)


@pytest.mark.parametrize("gib", [9, 10, 12])
def test_what_moves_is_priced_from_all_layers_before_it_is_chosen(gib: int) -> None:
    limits = Limits(device_bytes=gib * GIB)
    found = plan(WORKLOAD, MACHINE, limits, Search(activations=("host", "ssd"))).choices
    assert found
    for choice in found:
        planned = choice.prediction
        again = predict(planned.workload, planned.strategy, MACHINE, effort=EFFORT)
        assert again.device_bytes == planned.device_bytes <= gib * GIB
        assert again.step_s == pytest.approx(planned.step_s)


@pytest.mark.parametrize(
    ("part", "longer", "taken"),
    [
        (0.95, 1.0, False),  # a limit that a run is held to, for a twentieth less
        (0.5, 1.0, True),
        (0.95, 0.9, True),
    ],
)
def test_less_is_moved_only_where_it_spares_much_or_time(
    part: float, longer: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(device_bytes=9 * GIB)
    search = Search(activations=("ssd",), placements=("device",), micro_batches=(4,))
    given: list[int] = []

    def refined(_self: Searched, choice: Any, _room: float, _states: Any) -> Any:
        step = choice.step
        given.append(step.moved_bytes)
        less = replace(step, ssd_bytes=int(part * step.ssd_bytes), stall_s=longer * step.stall_s)
        return replace(choice, strategy=replace(choice.strategy, memory_bytes=7), step=less)

    monkeypatch.setattr(Searched, "refined", refined)
    best = plan(WORKLOAD, MACHINE, limits, search).choices[0].prediction
    assert given[0] > 0
    assert (best.strategy.memory_bytes == 7) == taken


def test_a_host_that_is_the_device_bounds_it_too() -> None:
    alone = replace(MACHINE, link=None, drive=None)
    found = plan(WORKLOAD, alone, Limits(host_bytes=1 * GIB))
    assert not found.choices
    assert found.over is not None
    assert "device_bytes" in found.over


def test_what_is_written_every_day_keeps_to_what_a_run_lets_through() -> None:
    budget = WriteBudget(needed_per_day(1000.0), 0.0)
    assert budget.bytes_per_s == pytest.approx(1000.0)


def test_more_memory_is_never_slower() -> None:
    steps = [
        plan(WORKLOAD, MACHINE, Limits(device_bytes=gib * GIB)).choices[0].prediction.step_s
        for gib in (8, 10, 14, 20, 40, 80)
    ]
    # Those within half a percent of the fastest are as good.
    assert all(after <= before * 1.006 for before, after in itertools.pairwise(steps))
    assert steps[0] > steps[-1]


@pytest.mark.parametrize(
    "workload",
    [
        WORKLOAD,
        replace(WORKLOAD, parallel=Parallel(pipeline=4), accumulation=4),
        replace(WORKLOAD, parallel=Parallel(pipeline=2, chunks=4), accumulation=4),
        replace(WORKLOAD, parallel=Parallel(data=2, zero_stage=3), accumulation=2),
        replace(WORKLOAD, parallel=Parallel(data=2, zero_stage=1), framework="deepspeed"),
    ],
    ids=["one", "pipeline", "chunks", "zero 3", "deepspeed"],
)
def test_pairs_are_compared_by_the_very_figures_that_are_predicted(workload: Workload) -> None:
    machine = replace(MACHINE, devices=4)
    searched = Searched(workload, machine, 3)
    compared = 0
    for one in searched.workloads((), (), ()):
        states = list(searched.states(one, ("offload",), ("device", "host", "ssd")))
        modes = ("keep", "recompute", "host", "ssd")
        for activations in searched.activations(modes, 20.0 * GIB, states):
            for each in states:
                strategy = activations.strategy.with_states_of(each.strategy)
                full = combined(one, strategy, machine, activations.step, each.update)
                assert activations.step_s(each) == pytest.approx(full.step_s)
                assert activations.device_bytes(each, machine) == full.device_bytes
                assert activations.written(each) == full.ssd_write_bytes
                assert each.ssd_bytes + activations.ssd_bytes == full.ssd_bytes
                host = each.host_bytes[0] + activations.host_bytes, each.host_bytes[1]
                assert max(host) == full.host_bytes
                compared += 1
    assert compared > 20


def test_forwards_of_a_pipeline_share_the_room_there_is() -> None:
    staged = replace(WORKLOAD, parallel=Parallel(pipeline=4), accumulation=16)
    machine = replace(MACHINE, devices=4)

    def predicted(limits: Limits) -> dict[str, Prediction]:
        search = Search(activations=("host",), placements=("device",), micro_batches=(4,))
        return {
            each.name: each.prediction for each in plan(staged, machine, limits, search).choices
        }

    free = predicted(Limits())
    least = free["least memory"]
    assert least.device_bytes < free["fastest"].device_bytes
    kept = [each.tier for each in free["fastest"].held if each.name == "activations"]
    assert kept == ["device"], "all of it has room"
    # Less than what makes nobody wait: each stage has it for as many forwards as are under way.
    room = round(0.97 * least.device_bytes)
    some = predicted(Limits(device_bytes=room))["fastest"]
    assert some.device_bytes <= room
    assert some.host_bytes > least.host_bytes
    assert some.step_s < 1.5 * least.step_s
    again = predict(staged, some.strategy, machine)
    assert again.device_bytes == pytest.approx(some.device_bytes, rel=0.1)


def test_where_nothing_fits_it_says_what_would_do() -> None:
    limits = Limits(device_bytes=1 * GIB)
    found = plan(WORKLOAD, MACHINE, limits)
    assert not found.choices
    assert found.closest is not None
    assert found.closest.device_bytes - 1 * GIB == found.over["device_bytes"]  # type: ignore[index]
    assert "of device memory (now 1.00 GiB)" in found.change


def test_a_sequence_that_would_fit_is_offered() -> None:
    long = replace(WORKLOAD, seq_len=1 << 18, micro_batch=1)
    found = plan(long, MACHINE, Limits(device_bytes=24 * GIB))
    assert not found.choices
    offered = int(found.change.split("seq_len=")[1].split()[0])
    assert plan(replace(long, seq_len=offered), MACHINE, Limits(device_bytes=24 * GIB)).choices
    twice = replace(long, seq_len=2 * offered)
    assert not plan(twice, MACHINE, Limits(device_bytes=24 * GIB)).choices


def test_no_sequence_is_offered_where_states_alone_do_not_fit() -> None:
    limits = Limits(device_bytes=1 * GIB)
    assert "seq_len" not in plan(WORKLOAD, MACHINE, limits).change
    assert not plan(replace(WORKLOAD, seq_len=32), MACHINE, limits).choices


def test_a_days_bytes_keep_the_ssd_from_being_chosen() -> None:
    limits = Limits(device_bytes=8 * GIB, host_bytes=8 * GIB)
    ssd = plan(WORKLOAD, MACHINE, limits, Search(activations=("ssd",), placements=("ssd",)))
    assert ssd.choices[0].prediction.ssd_write_bytes > 0
    none = replace(limits, ssd_write_bytes_per_day=1 << 30)
    found = plan(WORKLOAD, MACHINE, none, Search(activations=("ssd",), placements=("ssd",)))
    assert not found.choices


@pytest.mark.parametrize("sequences", [120, 1440, 4096, 1 << 20, 997])
def test_however_many_sequences_a_micro_batch_of_one_and_the_given_one_are_tried(
    sequences: int,
) -> None:
    given = next(size for size in range(5, sequences + 1) if sequences % size == 0)
    one = replace(WORKLOAD, micro_batch=given, accumulation=sequences // given)
    sizes = [each.micro_batch for each in Searched(one, MACHINE, 4).workloads((), (), ())]
    assert {1, given, sequences} <= {*sizes}
    assert all(sequences % size == 0 for size in sizes)
    assert len(sizes) <= 13


@pytest.mark.parametrize(("data", "stage", "early"), [(1, 0, True), (2, 0, False), (2, 3, True)])
def test_gradients_leave_early_only_where_no_other_ranks_are_added_later(
    data: int, stage: int, early: bool
) -> None:
    one = replace(WORKLOAD, parallel=Parallel(data=data, zero_stage=stage))
    machine = replace(MACHINE, devices=2)
    states = [*Searched(one, machine, 4).states(one, ("offload",), ("host", "ssd"))]
    assert {each.strategy.early_gradients for each in states} == {early}


def test_stages_that_divide_no_ranks_are_named() -> None:
    with pytest.raises(ValueError, match=r"pipelines=\(3,\): no number of stages divides"):
        plan(WORKLOAD, MACHINE, search=Search(pipelines=(3,)))


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_a_machine_without_a_device_is_planned_for(kind: str) -> None:
    alone = replace(read_machine("laptop"), link=None)
    model = plain_model(kind, num_layers=6, hidden_size=384, num_heads=6, seq_len=256)
    workload = Workload(model=model, seq_len=256, micro_batch=8, dtype="float32", plain=kind)
    whole = plan(workload, alone).choices[0].prediction
    assert whole.strategy.activations == "keep"
    tight = Limits(device_bytes=int(whole.device_bytes * 0.7))
    found = plan(workload, alone, tight)
    assert found.choices[0].prediction.device_bytes <= tight.device_bytes  # type: ignore[operator]
    assert found.choices[0].prediction.strategy.activations != "host"


def test_what_cannot_be_chosen_at_all_is_refused() -> None:
    bare = replace(MACHINE, drive=None)
    with pytest.raises(ValueError, match="nothing to choose from"):
        plan(WORKLOAD, bare, search=Search(activations=("ssd",)))


def test_limits_are_the_machines_where_none_is_given() -> None:
    machine = replace(MACHINE, devices=4)
    found = limits_of(machine, Limits(ssd_bytes=400))
    assert found["device_bytes"] == machine.device.memory_bytes
    assert found["host_bytes"] <= machine.host.memory_bytes / 4
    assert found["ssd_bytes"] == 100
    assert "ssd_write_bytes_per_day" not in found


@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(1, 9),
    hidden=st.sampled_from([64, 192]),
    seq=st.sampled_from([32, 300]),
    micro=st.integers(1, 6),
    gib=st.sampled_from([2, 3, 80]),
    more=st.fixed_dictionaries(
        {"accumulation": st.integers(1, 3), "dtype": st.sampled_from(["float32", "bfloat16"])}
    ),
)
def test_any_shape_is_planned_or_told_what_it_lacks(
    layers: int, hidden: int, seq: int, micro: int, gib: int, more: dict[str, Any]
) -> None:
    model = replace(
        MODEL,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=4,
        num_kv_heads=4,
        head_size=hidden // 4,
        ffn_size=4 * hidden,
        embedding_size=hidden,
    )
    found = plan(
        Workload(model=model, seq_len=seq, micro_batch=micro, **more),
        MACHINE,
        Limits(device_bytes=gib * GIB),
    )
    assert found.choices or found.change
    for choice in found.choices:
        assert 0 < choice.prediction.device_bytes <= gib * GIB
        assert choice.prediction.step_s > 0
