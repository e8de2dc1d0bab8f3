"""What ranks send each other: over which network each group goes, and how often."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from perfmodel.layers import CUDA, Shape, tape_of
from perfmodel.machine import read_machine
from perfmodel.model import Model
from perfmodel.network import RankTraffic, network_rate, operator_network_s, rank_traffic, sent_s
from perfmodel.tape import Operator
from perfmodel.workload import Parallel, Workload

MODEL = Model(num_layers=4, hidden_size=512, num_heads=8, vocab_size=2048, max_positions=256)
# Eight devices, and 360 GB/s among them.
MACHINE = replace(read_machine("h100-sxm"), devices=8)


def test_a_group_that_leaves_its_node_is_as_fast_as_what_joins_nodes() -> None:
    assert network_rate(MACHINE, 8) == MACHINE.network_bytes_per_s
    assert network_rate(MACHINE, 9) == MACHINE.between_nodes_bytes_per_s == 50e9
    assert network_rate(replace(MACHINE, between_nodes_bytes_per_s=0.0), 9) == 25e9
    with pytest.raises(ValueError, match="network_bytes_per_s=0 of 'h100-sxm' joins no 2 ranks"):
        network_rate(replace(MACHINE, network_bytes_per_s=0.0), 2)


def test_ranks_that_share_maps_stay_on_a_node_whose_sequences_reach_over_several() -> None:
    shared = Parallel(tensor=8, context=2)
    summed, attended = (
        operator_network_s(Operator(name, network_bytes=1e9), shared, MACHINE)[0]
        for name in ("reduce", "attention")
    )
    assert summed == pytest.approx(1e9 / MACHINE.network_bytes_per_s)
    assert attended == pytest.approx(1e9 / MACHINE.between_nodes_bytes_per_s)


def layers_s(shape: Shape, parallel: Parallel, *, lora_rank: int = 0) -> tuple[float, float]:
    """All seconds of the network in a forward and in a backward."""
    tape = tape_of(MODEL, shape, lora_rank=lora_rank)
    ways = [operator_network_s(each, parallel, MACHINE) for each in tape.operators]
    forward_s, backward_s = (sum(way) for way in zip(*ways, strict=True))
    return forward_s, backward_s


@pytest.mark.parametrize("sequence", [False, True])
def test_a_backward_sends_what_megatron_sums_and_gathers_in_it(sequence: bool) -> None:
    shape = Shape(batch=2, seq_len=256, element_bytes=2, tensor=4, sequence=sequence, kernels=CUDA)
    parallel = Parallel(tensor=4, sequence=sequence)
    # An all-reduce goes round a ring twice, and is a reduce-scatter and a gather.
    round_s = 2 * 256 * 512 * 2 * 3 / 4 / MACHINE.network_bytes_per_s
    # Attention and the perceptron of four layers, and the embedding forward or the head backward.
    sums_s = 2 * round_s * (4 * 2 + 1)
    forward_s, backward_s = layers_s(shape, parallel)
    if not sequence:
        assert backward_s == pytest.approx(sums_s)
        # The loss sums three numbers of each position besides, and its backward none.
        assert forward_s == pytest.approx(sums_s, rel=0.01)
        assert forward_s > sums_s
        return
    # The embedding scatters and the head gathers; what was gathered is gathered once more.
    assert forward_s == pytest.approx(sums_s, rel=0.01)
    assert backward_s == pytest.approx(sums_s + round_s * (4 * 2 + 1))


def test_what_has_no_backward_sends_nothing_in_it() -> None:
    shape = Shape(batch=2, seq_len=256, element_bytes=2, tensor=4, kernels=CUDA)
    whole, adapters = (layers_s(shape, Parallel(tensor=4), lora_rank=rank) for rank in (0, 8))
    assert adapters[0] == pytest.approx(whole[0])
    # The sum behind the token table, of which nothing is trained.
    assert adapters[1] == pytest.approx(whole[1] * 8 / 9)


def test_keys_and_values_go_round_in_a_backward_and_their_gradients_too() -> None:
    shape = Shape(batch=2, seq_len=256, element_bytes=2, context=2, kernels=CUDA)
    forward_s, backward_s = layers_s(shape, Parallel(context=2))
    assert forward_s > 0
    assert backward_s == pytest.approx(2 * forward_s)


def test_gradients_stay_on_a_node_where_only_the_stages_are_on_several() -> None:
    alone, staged = (
        rank_traffic(
            Workload(
                model=replace(MODEL, num_layers=4 * stages),
                seq_len=256,
                accumulation=8,
                parallel=Parallel(data=8, pipeline=stages),
            ),
            MACHINE,
        )
        for stages in (1, 4)
    )
    # A stage has as many layers as the whole of the smaller model, and no more of all else.
    assert 0 < staged.sum_s <= alone.sum_s


def test_stages_send_each_other_the_stream_and_its_gradient_for_each_of_their_parts() -> None:
    def staged_s(**parallel: Any) -> float:
        shared = Parallel(pipeline=2, **parallel)
        return sent_s(Workload(model=MODEL, seq_len=256, parallel=shared), MACHINE)

    assert staged_s() == pytest.approx(2 * 256 * 512 * 2 / MACHINE.network_bytes_per_s)
    assert staged_s(chunks=2) == pytest.approx(2 * staged_s())
    # Ranks of tensor have a part of it each; the next stage of eight ranks is on another node.
    slower = MACHINE.network_bytes_per_s / MACHINE.between_nodes_bytes_per_s
    assert staged_s(tensor=8) == pytest.approx(staged_s() / 8 * slower)
    assert sent_s(Workload(model=MODEL, seq_len=256), MACHINE) == 0


def traffic(framework: str, stage: int, **changes: Any) -> RankTraffic:
    shared = Parallel(data=4, zero_stage=stage)
    more = {"accumulation": 3, **changes}
    return rank_traffic(
        Workload(model=MODEL, seq_len=256, framework=framework, parallel=shared, **more), MACHINE
    )


PART_S = MODEL.num_params * 3 / 4 / MACHINE.network_bytes_per_s  # a byte of each parameter


@pytest.mark.parametrize("framework", ["torch", "deepspeed", "megatron"])
def test_without_zero_gradients_are_summed_once_and_all_ranks_get_them(framework: str) -> None:
    found = traffic(framework, 0)
    wide = 2 if framework == "megatron" else 1
    assert found.busy_s(3) == pytest.approx(2 * 2 * wide * PART_S)
    assert found.after_s == 0


@pytest.mark.parametrize(("dtype", "nbytes"), [("bfloat16", 4), ("float16", 2), ("float32", 4)])
def test_megatron_sums_in_fp32_but_beside_float16(dtype: str, nbytes: int) -> None:
    found = traffic("megatron", 1, dtype=dtype)
    assert found.sum_s == pytest.approx(nbytes * PART_S)
    assert found.after_s == pytest.approx((4 if dtype == "float32" else 2) * PART_S)
    assert found.sums == 1


def test_deepspeed_sums_in_every_backward_from_stage_2_on() -> None:
    one, two = (traffic("deepspeed", stage) for stage in (1, 2))
    assert one.busy_s(3) == pytest.approx((2 + 2) * PART_S)
    assert two.busy_s(3) == pytest.approx((3 * 2 + 2) * PART_S)
    # Each is beside a backward of its own.
    assert two.waited_s(3, two.sum_s / 2, 0.0) == pytest.approx(two.sum_s * 3 / 2 + two.after_s)


def test_fsdp_gathers_in_every_forward_and_backward_what_is_not_trained_as_well() -> None:
    two, three = (traffic("torch", stage) for stage in (2, 3))
    assert two.busy_s(3) == two.beside_all_s == pytest.approx(3 * (2 + 2) * PART_S)
    assert three.busy_s(3) == three.beside_all_s == pytest.approx(3 * (2 + 2 + 2) * PART_S)
    adapters = traffic("torch", 2, lora_rank=8)
    assert adapters.busy_s(3) == pytest.approx(3 * 2 * PART_S, rel=0.1)
    assert traffic("deepspeed", 2, lora_rank=8).busy_s(3) < 0.1 * adapters.busy_s(3)


def test_torchs_stage_1_sums_all_gradients_on_every_rank() -> None:
    assert traffic("torch", 1).sum_s == traffic("torch", 0).sum_s
    assert traffic("torch", 1).after_s > 0
