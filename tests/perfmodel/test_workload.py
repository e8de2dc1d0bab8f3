"""Workloads and strategies: what contradicts itself is refused, by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from perfmodel.model import Model
from perfmodel.plain_models import plain_model
from perfmodel.workload import FRAMEWORKS, Parallel, Strategy, Workload

MODEL = plain_model("gpt", num_layers=6, hidden_size=384, num_heads=6, seq_len=256)


def workload(**changes: Any) -> Workload:
    return Workload(model=MODEL, **{"seq_len": 256, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seq_len": 0}, "seq_len=0"),
        ({"micro_batch": 1.5}, "micro_batch=1.5"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"framework": "jax"}, "framework='jax'"),
        ({"parallel": Parallel(tensor=4)}, "tensor=4 does not divide num_heads=6"),
        ({"parallel": Parallel(context=3)}, "context=3 does not divide seq_len=256"),
        ({"parallel": Parallel(pipeline=4, chunks=2)}, "8 parts of 6 layers"),
    ],
)
def test_a_workload_that_cannot_be_is_refused_by_its_key(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        workload(**changes)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_ranks_share_heads_of_keys_or_have_one_together(framework: str) -> None:
    def split(tensor: int) -> Workload:
        parallel = Parallel(tensor=tensor)
        return Workload(model=model, seq_len=64, framework=framework, parallel=parallel)

    model = Model(num_layers=1, hidden_size=96, num_heads=12, num_kv_heads=6, vocab_size=9)
    for tensor in (1, 2, 3, 6, 12):
        assert split(tensor).parallel.tensor == tensor
    with pytest.raises(ValueError, match="tensor=4 neither divides num_kv_heads=6 nor is a mult"):
        split(4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"zero_stage": 4}, "zero_stage=4"),
        ({"chunks": 2}, "chunks=2"),
        ({"zero_stage": 3, "pipeline": 2}, "zero_stage=3"),
    ],
)
def test_parallelism_that_contradicts_itself_is_refused(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        Parallel(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activations": "disk"}, "activations='disk'"),
        ({"placement": "disk"}, "placement='disk'"),
        ({"optimizer": "torch", "placement": "host"}, "placement='host'"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused_by_its_key(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        Strategy(**changes)


def test_another_micro_batch_is_the_same_step() -> None:
    one = workload(micro_batch=2, accumulation=6, parallel=Parallel(data=2))
    other = one.with_batch(4)
    assert (other.micro_batch, other.accumulation, other.tokens) == (4, 3, one.tokens)
    with pytest.raises(ValueError, match="micro_batch=5"):
        one.with_batch(5)


def test_a_workload_is_written_as_json() -> None:
    assert json.loads(json.dumps(workload().to_json()))["model"]["hidden_size"] == 384
