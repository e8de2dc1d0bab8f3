"""Whole steps: parts add up, limits of a machine are named, more ranks never need more memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.activation_step import activation_step
from perfmodel.machine import Curve, read_machine
from perfmodel.model import Model
from perfmodel.plain_models import PLAIN_MODELS, plain_model
from perfmodel.prediction import (
    Prediction,
    first_stage_tape,
    predict,
    rank_tape,
    rank_times,
    shape_of,
    zeroed_s,
)
from perfmodel.shape import MEGATRON
from perfmodel.workload import Parallel, Strategy, Workload

MACHINE = read_machine("a100-80gb-sxm")
MODEL = Model(
    num_layers=8,
    hidden_size=512,
    num_heads=8,
    vocab_size=2048,
    norm="rms",
    positions="rotary",
    gated=True,
    activation="silu",
    attention_bias=False,
    ffn_bias=False,
)


def step(strategy: Strategy | None = None, **changes: Any) -> Prediction:
    workload = Workload(**{"model": MODEL, "seq_len": 512, "micro_batch": 4, **changes})
    return predict(workload, strategy or Strategy(), MACHINE, effort=0.0)


CHOICES = [
    Strategy(),
    Strategy(activations="recompute"),
    Strategy(activations="ssd"),
    Strategy(activations="host", placement="host"),
    Strategy(placement="host=0.5,device=0.5", early_gradients=True),
    Strategy(placement="ssd"),
    Strategy(optimizer="torch"),
]


@pytest.mark.parametrize("strategy", CHOICES, ids=str)
def test_the_parts_of_a_step_add_up(strategy: Strategy) -> None:
    found = step(strategy, accumulation=3)
    assert sum(found.parts_s.values()) == pytest.approx(found.step_s)
    assert all(seconds > 0 for seconds in found.parts_s.values())
    assert all(0 < part <= 1 for part in found.busy.values())
    assert found.tokens_per_s == pytest.approx(512 * 4 * 3 / found.step_s)
    assert found.bottleneck


def test_states_that_leave_the_device_are_on_their_tier_and_take_time() -> None:
    device, host, ssd = (step(Strategy(placement=tier)) for tier in ("device", "host", "ssd"))
    states = 12 * MODEL.num_params
    assert device.device_bytes - host.device_bytes > 0.9 * states - 512 * 2**20
    assert host.host_bytes >= states
    assert ssd.ssd_bytes >= states
    assert device.step_s < host.step_s < ssd.step_s
    assert device.ssd_write_bytes == host.ssd_write_bytes == 0
    assert ssd.ssd_write_bytes == states


def test_the_bottleneck_is_what_takes_most_and_what_is_waited_for_is_said() -> None:
    assert step(accumulation=16).bottleneck.startswith("computing, ")
    assert step(Strategy(placement="ssd"), micro_batch=1).bottleneck.startswith("update, ")


def test_gradients_that_leave_early_are_not_waited_for() -> None:
    late = step(Strategy(placement="host", update_schedule="host"))
    early = step(Strategy(placement="host", update_schedule="host", early_gradients=True))
    assert early.step_s < late.step_s


def test_a_pipeline_has_a_bubble_that_more_micro_batches_make_smaller() -> None:
    few = step(parallel=Parallel(pipeline=4), accumulation=4)
    many = step(parallel=Parallel(pipeline=4), accumulation=32)
    assert few.parts_s["pipeline bubble"] / few.step_s > 0.3
    assert many.parts_s["pipeline bubble"] / many.step_s < 0.1


def test_megatron_computes_in_kernels_of_its_own() -> None:
    model = Model(num_layers=1, hidden_size=64, num_heads=4, vocab_size=100)
    workload = Workload(model=model, seq_len=16, framework="megatron", fused_attention=False)
    kernels = shape_of(workload, read_machine("h100-sxm")).kernels
    assert kernels == replace(MEGATRON, fused_attention=False)


@pytest.mark.parametrize("vocab", [2048, 1 << 16])
@pytest.mark.parametrize("kind", ["keep", "recompute", "ssd"])
def test_a_pipelines_first_stage_has_many_forwards_and_the_last_has_the_head(
    kind: str, vocab: int
) -> None:
    model, shared = replace(MODEL, vocab_size=vocab), Parallel(pipeline=4)
    workload = Workload(model=model, seq_len=512, micro_batch=4, accumulation=8, parallel=shared)
    strategy = Strategy(activations=kind, min_tensor_bytes=1)
    found = predict(workload, strategy, MACHINE, effort=0.0)
    first, last = (
        activation_step(tape, rank_times(tape, workload, MACHINE), MACHINE, strategy, effort=0.0)
        for tape in (first_stage_tape(workload, MACHINE), rank_tape(workload, MACHINE))
    )

    def taken(tier: str) -> int:
        items = (each for each in found.held if each.name == "activations")
        return sum(each.nbytes for each in items if each.tier == tier)

    with_all = first.device_bytes + 3 * first.saved_bytes
    assert taken("device") == max(with_all, last.device_bytes)
    assert taken("ssd") == max(4 * first.ssd_bytes, last.ssd_bytes)
    if kind == "keep":  # either may be the one with more
        assert (with_all > last.device_bytes) == (vocab == 2048)


def test_stages_wait_for_what_they_send_each_other() -> None:
    staged = {"parallel": Parallel(pipeline=4), "accumulation": 4, "seq_len": 512}
    workload = Workload(model=MODEL, micro_batch=4, **staged)  # type: ignore[arg-type]
    fast, slow = (replace(MACHINE, network_bytes_per_s=rate) for rate in (1e15, 1e9))
    steps = [predict(workload, Strategy(), machine) for machine in (fast, slow)]
    sent = 4 * 512 * MODEL.hidden_size * 2 * 2 / 1e9
    # Of four micro-batches, and of three more in the bubble.
    assert steps[1].parts_s["network"] == pytest.approx(4 * sent)
    assert steps[1].step_s - steps[0].step_s == pytest.approx(7 * sent, rel=1e-3)


def test_a_network_that_is_not_there_is_refused_by_name() -> None:
    laptop = read_machine("laptop")
    two = Workload(model=MODEL, seq_len=512, parallel=Parallel(data=2))
    alone = replace(laptop, devices=2)
    with pytest.raises(ValueError, match="network_bytes_per_s=0 of 'laptop'"):
        predict(two, Strategy(), alone)


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_the_models_of_the_example_are_predicted_without_a_device(kind: str) -> None:
    model = plain_model(kind, num_layers=2, hidden_size=64, num_heads=4, seq_len=32)
    workload = Workload(model=model, seq_len=32, dtype="float32", plain=kind)
    alone = replace(read_machine("laptop"), link=None)
    found = predict(workload, Strategy(optimizer="torch"), alone)
    assert found.host_bytes == found.pinned_bytes == 0
    assert found.device_bytes > 16 * model.num_params


def test_only_gradients_that_a_rank_keeps_are_set_to_nothing() -> None:
    def nothing_s(framework: str, stage: int) -> float:
        shared = Parallel(data=8, zero_stage=stage)
        return zeroed_s(
            Workload(model=MODEL, seq_len=512, framework=framework, parallel=shared), even
        )

    device = replace(MACHINE.device, memory_bytes_per_s=Curve.of(1e12))
    even = replace(MACHINE, device=device)
    whole_s = 2 * MODEL.num_params / 1e12
    assert nothing_s("torch", 0) == nothing_s("deepspeed", 1) == pytest.approx(whole_s)
    assert nothing_s("deepspeed", 2) == pytest.approx(whole_s / 8, rel=0.01)
    assert nothing_s("torch", 3) == pytest.approx(whole_s / 8, rel=0.01)
    assert nothing_s("megatron", 1) == pytest.approx(2 * whole_s)  # in fp32


workloads = st.builds(
    Workload,
    model=st.just(MODEL),
    seq_len=st.sampled_from([64, 256, 1024]),
    micro_batch=st.integers(1, 8),
    accumulation=st.integers(1, 8),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    framework=st.sampled_from(["torch", "deepspeed", "megatron"]),
    lora_rank=st.sampled_from([0, 8]),
)


@settings(max_examples=30, deadline=None)
@given(workload=workloads, strategy=st.sampled_from(CHOICES), stage=st.integers(0, 3))
def test_more_data_ranks_never_need_more_memory(
    workload: Workload, strategy: Strategy, stage: int
) -> None:
    found = [
        predict(
            replace(workload, parallel=Parallel(data=ranks, zero_stage=stage)),
            strategy,
            MACHINE,
            effort=0.0,
        )
        for ranks in (2, 8)
    ]
    # Megatron and DeepSpeed pad what each rank has.
    assert found[1].device_bytes <= found[0].device_bytes * 1.001
    assert min(found[0].device_bytes, found[0].step_s) > 0


@settings(max_examples=20, deadline=None)
@given(workload=workloads, strategy=st.sampled_from(CHOICES))
def test_longer_sequences_need_more_memory_and_time(workload: Workload, strategy: Strategy) -> None:
    longer = replace(workload, seq_len=2 * workload.seq_len)
    one, other = (predict(each, strategy, MACHINE, effort=0.0) for each in (workload, longer))
    assert one.step_s < other.step_s
    if strategy.activations in ("keep", "recompute"):
        # As much where the update needs more than the backward.
        assert one.device_bytes <= other.device_bytes
        few, many = (
            sum(each.nbytes for each in found.held if each.name == "activations")
            for found in (one, other)
        )
        assert few < many
