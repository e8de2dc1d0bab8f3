"""Steps on many devices, by hand, and what must hold of any."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.cluster import (
    accumulation_of,
    bubble_share,
    forwards_under_way,
    needed_bytes_per_s,
    rank_model,
    simulate_cluster,
)
from perfmodel.layers import CUDA, Shape, tape_of
from perfmodel.machine import read_machine
from perfmodel.model import Model
from perfmodel.published import layer_activation_bytes
from perfmodel.workload import Parallel, Workload

MACHINE = read_machine("a100-80gb-sxm")
MODEL = Model(
    num_layers=16, hidden_size=2048, num_heads=16, vocab_size=1024, max_positions=512, dropout=0.1
)


def workload(micro_batch: int = 1, batch: int = 64, **parallel: int | bool) -> Workload:
    shared = Parallel(**parallel)  # type: ignore[arg-type]
    return Workload(
        model=MODEL,
        seq_len=512,
        micro_batch=micro_batch,
        accumulation=accumulation_of(batch, micro_batch, shared.data),
        parallel=shared,
    )


def test_the_bubble_is_what_its_paper_says() -> None:
    assert bubble_share(1, 4) == 0
    assert bubble_share(8, 64) == 7 / 64
    assert bubble_share(8, 64, 2) == 7 / 128
    with pytest.raises(ValueError, match="micro_batches=0"):
        bubble_share(2, 0)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([2, 4, 8]))
def test_larger_micro_batches_are_larger_bubbles(micro_batch: int, pipeline: int) -> None:
    small, large = (
        simulate_cluster(workload(size, pipeline=pipeline), MACHINE)
        for size in (micro_batch, 2 * micro_batch)
    )
    assert large.bubble_share == pytest.approx(2 * small.bubble_share)
    assert large.activation_bytes == pytest.approx(small.activation_bytes)
    half = simulate_cluster(workload(micro_batch, pipeline=pipeline, chunks=2), MACHINE)
    assert half.bubble_share == small.bubble_share / 2


def test_a_step_is_its_micro_batches_and_the_bubble() -> None:
    alone, many = (simulate_cluster(workload(batch=size), MACHINE) for size in (1, 64))
    deep = simulate_cluster(workload(pipeline=4), replace(MACHINE, network_bytes_per_s=1e15))
    assert many.step_s < 64 * alone.step_s, "one update for all"
    ideal_s = many.step_s / 4
    assert ideal_s * (1 + deep.bubble_share) == pytest.approx(deep.step_s, rel=0.05)
    assert deep.tokens_per_s == pytest.approx(64 * 512 / deep.step_s)


def test_recomputing_takes_a_third_more_and_saves_little() -> None:
    keep, again = (simulate_cluster(workload(4), MACHINE, recompute=it) for it in (False, True))
    assert 1.2 < again.step_s / keep.step_s < 1.4
    assert again.activation_bytes < keep.activation_bytes / 8
    layers = MODEL.num_layers * 512 * 64 * MODEL.hidden_size * 2
    assert again.activation_bytes >= layers


def test_tensor_ranks_save_what_the_published_formula_says() -> None:
    for ranks, sequence in ((1, False), (4, False), (4, True)):
        found = [
            simulate_cluster(
                replace(
                    workload(batch=1, tensor=ranks, sequence=sequence),
                    model=replace(MODEL, num_layers=layers),
                ),
                MACHINE,
            ).activation_bytes
            for layers in (1, 2)
        ]
        formula = layer_activation_bytes(
            512, 1, 2048, 16, ranks, sequence=sequence, recompute="selective"
        )
        # Norms' and attention's statistics are left out there.
        assert formula < found[1] - found[0] < 1.02 * formula


def test_what_a_rank_has_is_its_part_of_the_model() -> None:
    part = rank_model(MODEL, 4)
    assert part.query_size * 4 == MODEL.query_size
    assert part.ffn_size * 4 == MODEL.ffn_size
    shape = Shape(batch=1, seq_len=512, element_bytes=2, kernels=CUDA)
    flops = [
        sum(each.matmul_flops for each in tape_of(model, shape).operators)
        for model in (MODEL, part)
    ]
    assert flops[0] == pytest.approx(4 * flops[1])


def test_more_is_in_flight_in_deeper_pipelines_until_micro_batches_run_out() -> None:
    one, four = (simulate_cluster(workload(pipeline=p), MACHINE) for p in (1, 4))
    assert four.in_flight_bytes == pytest.approx(one.in_flight_bytes, rel=0.1)
    few = simulate_cluster(workload(batch=2, pipeline=4), MACHINE)
    assert few.in_flight_bytes < 0.6 * four.in_flight_bytes
    chunks = simulate_cluster(workload(pipeline=4, chunks=2), MACHINE)
    assert chunks.in_flight_bytes > 1.3 * four.in_flight_bytes


@given(st.integers(2, 16), st.integers(2, 4))
def test_what_is_under_way_is_what_megatron_begins_with_and_one_more(p: int, v: int) -> None:
    # Forwards of a stage's chunk before its first backward, of the first stage and of the last.
    warm = 2 * (p - 1) + (v - 1) * p, (v - 1) * p
    chunks = forwards_under_way(Parallel(pipeline=p, chunks=v), 1000)
    assert chunks == pytest.approx([(count + 1) / v for count in warm])
    assert forwards_under_way(Parallel(pipeline=p), 1000) == (p, 1)
    assert forwards_under_way(Parallel(pipeline=p, chunks=v), 1) == (1, 1)
    assert forwards_under_way(Parallel(), 1000) == (1, 1)


def test_sharing_states_shares_their_update_and_gathering_takes_time() -> None:
    plain, first, third = (
        simulate_cluster(workload(data=16, zero_stage=stage), MACHINE) for stage in (0, 1, 3)
    )
    assert first.step_s < plain.step_s
    slowed = replace(MACHINE, between_nodes_bytes_per_s=1e9)
    slow = simulate_cluster(workload(data=16, zero_stage=3), slowed)
    assert slow.step_s > 2 * third.step_s
    assert slow.write_bytes_per_s < third.write_bytes_per_s / 2


def test_a_drive_is_shared_by_its_node_and_wears() -> None:
    found = simulate_cluster(workload(data=8), MACHINE)
    assert MACHINE.drive is not None
    days = found.life_days
    assert days is not None
    written = found.write_bytes_per_s / 2 * 86400 * days * MACHINE.devices
    assert written == pytest.approx(MACHINE.drive.rated_bytes)
    better = simulate_cluster(workload(data=8), MACHINE, rated_amplification=2.5)
    assert better.life_days == pytest.approx(2.5 * days)
    without = simulate_cluster(workload(data=8), replace(MACHINE, drive=None))
    assert without.life_days is None


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(ValueError, match="context=2"):
        simulate_cluster(workload(context=2), MACHINE)
    with pytest.raises(ValueError, match="network_bytes_per_s=0"):
        simulate_cluster(workload(tensor=2), replace(MACHINE, network_bytes_per_s=0.0))
    with pytest.raises(ValueError, match="global_batch=10"):
        accumulation_of(10, 4, 1)
    with pytest.raises(ValueError, match=r"step_s=0\.0"):
        needed_bytes_per_s(1.0, 0.0)
