"""What ranks send each other: over which network each group goes, and how often."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perfmodel.machine import read_machine
from perfmodel.model import Model
from perfmodel.network import network_rate, operator_network_s, rank_traffic
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
    assert 0 < staged.beside_backward_s <= alone.beside_backward_s
