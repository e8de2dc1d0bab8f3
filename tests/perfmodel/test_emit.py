"""What is emitted says what is meant, and the framework itself takes it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.integrations.deepspeed_config import split
from perfmodel.emit import emit_deepspeed, emit_transformers, recomputed_layers
from perfmodel.model import Model
from perfmodel.plan_file import Plan
from perfmodel.workload import Parallel, Strategy, Workload
from tests.perfmodel.workloads import PATH, strategies, tried, workloads

MODEL = Model(num_layers=8, hidden_size=64, num_heads=4, vocab_size=100)
WORKLOAD = Workload(model=MODEL, seq_len=32, micro_batch=2, accumulation=3, framework="deepspeed")
# Most that is drawn at random no framework can do.
MANY_REFUSED = settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


def on(**parallel: Any) -> Workload:
    return replace(WORKLOAD, parallel=Parallel(**parallel))


def deepspeed_of(workload: Workload, strategy: Strategy) -> dict[str, Any]:
    return emit_deepspeed(workload, strategy, Plan.of(workload, strategy, path=PATH))


@pytest.mark.parametrize(
    ("strategy", "layers"),
    [
        (Strategy(), ()),
        (Strategy(activations="recompute"), tuple(range(8))),
        (Strategy(activations="recompute", recompute=()), ()),
        (Strategy(activations="ssd"), ()),
        (Strategy(activations="ssd", recompute=(5, 2)), (2, 5)),
    ],
)
def test_layers_are_run_again_as_the_strategy_says(
    strategy: Strategy, layers: tuple[int, ...]
) -> None:
    assert recomputed_layers(WORKLOAD, strategy) == layers


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 8; there are 8"):
        recomputed_layers(WORKLOAD, Strategy(activations="recompute", recompute=(8,)))


class Ranks:
    """Stands in for DeepSpeed's `mpu`: only it knows how many ranks share the data."""

    def __init__(self, data: int) -> None:
        self._data = data

    def get_data_parallel_world_size(self) -> int:
        return self._data


@MANY_REFUSED
@given(st.data())
def test_deepspeed_takes_every_config_that_is_emitted_for_it(data: st.DataObject) -> None:
    module = pytest.importorskip("deepspeed")
    workload = data.draw(workloads("deepspeed"))
    strategy = data.draw(strategies(workload.model.num_layers))
    found = json.loads(json.dumps(tried(deepspeed_of, workload=workload, strategy=strategy)))
    with mock.patch.object(module.comm, "get_rank", return_value=0):
        taken = module.DeepSpeedConfig(found, mpu=Ranks(workload.parallel.data))
    assert taken.train_batch_size * workload.seq_len == workload.tokens
    assert taken.train_micro_batch_size_per_gpu == workload.micro_batch
    assert taken.gradient_accumulation_steps == workload.accumulation
    assert taken.zero_optimization_stage == workload.parallel.zero_stage
    enabled = (taken.bfloat16_config.enabled, taken.float16_config.enabled)
    assert enabled == (workload.dtype == "bfloat16", workload.dtype == "float16")
    assert taken.tensor_parallel_config.autotp_size in (0, workload.parallel.tensor)
    off = taken.zero_config.offload_optimizer
    assert (off is not None and off.device == "cpu") == ("device" not in strategy.shares)
    if strategy.activations != "recompute" and not strategy.recompute:  # which is DeepSpeed's
        assert Plan.from_mapping(found["offload"]) == Plan.of(workload, strategy, path=PATH)
    ours = split(found, has_client=False)
    assert (ours.optimizer is not None) is (strategy.optimizer == "offload")


def test_every_stage_and_placement_has_its_deepspeed_config() -> None:
    for stage in (1, 2, 3):
        for placement in ("host", "ssd", "host=0.5,ssd=0.5"):
            found = deepspeed_of(on(data=2, zero_stage=stage), Strategy(placement=placement))
            assert found["zero_optimization"] == {
                "stage": stage,
                "offload_optimizer": {"device": "cpu"},
            }
        kept = deepspeed_of(on(data=2, zero_stage=stage), Strategy(optimizer="torch"))
        assert "offload_optimizer" not in kept["zero_optimization"]


def test_a_pipeline_of_deepspeeds_checkpoints_each_of_its_layers() -> None:
    again = deepspeed_of(on(pipeline=2, data=2), Strategy(activations="recompute"))
    assert again["pipeline"] == {"stages": 2, "activation_checkpoint_interval": 1}
    assert again["activation_checkpointing"] == {"number_checkpoints": 8}
    kept = deepspeed_of(on(pipeline=2, data=2), Strategy())
    assert kept["pipeline"]["activation_checkpoint_interval"] == 0


@pytest.mark.parametrize(
    ("parallel", "chosen", "named"),
    [
        ({"pipeline": 2, "zero_stage": 2}, {}, "zero_stage=2 does not go with pipeline=2"),
        ({"pipeline": 2, "chunks": 2}, {}, "chunks=2"),
        ({"pipeline": 2, "tensor": 2}, {}, "pipeline=2 goes with tensor=1"),
        ({"tensor": 2, "context": 2}, {}, "tensor=2 does not go with context=2"),
        ({"tensor": 2, "sequence": True}, {}, "sequence=True"),
        (
            {"pipeline": 2},
            {"activations": "recompute", "recompute": (1,)},
            r"recompute=\(1,\) of a pipeline",
        ),
        ({"zero_stage": 1}, {"placement": "device=0.5,host=0.5"}, "placement='device=0.5"),
        ({}, {"placement": "host"}, "placement='host' needs zero_stage 1, 2 or 3"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_in_one_line(
    parallel: dict[str, Any], chosen: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        deepspeed_of(on(**parallel), Strategy(**chosen))
    assert "\n" not in str(caught.value)


def test_a_plan_for_something_else_is_not_emitted() -> None:
    plan = Plan.of(WORKLOAD, Strategy())
    with pytest.raises(ValueError, match="seq_len is 32 in the plan and 64 here"):
        emit_deepspeed(replace(WORKLOAD, seq_len=64), Strategy(), plan)
    with pytest.raises(ValueError, match="optimizer='torch' is not that of the plan"):
        emit_deepspeed(WORKLOAD, Strategy(optimizer="torch"), plan)


@MANY_REFUSED
@given(workloads(), strategies(layers=1))
def test_a_trainer_takes_what_is_emitted_for_it(workload: Workload, strategy: Strategy) -> None:
    found = tried(emit_transformers, workload=workload, strategy=strategy)
    assert found["per_device_train_batch_size"] == workload.micro_batch
    assert found["gradient_accumulation_steps"] == workload.accumulation
    assert found["gradient_checkpointing"] == bool(recomputed_layers(workload, strategy))
    transformers = pytest.importorskip("transformers")
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert set(found) <= known


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the keys' names until transformers 6
def test_a_trainers_arguments_are_what_was_meant(dtype: str, mode: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    workload = replace(WORKLOAD, dtype=dtype)
    found = emit_transformers(workload, Strategy(activations=mode, optimizer="torch"))
    taken = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **found)
    assert taken.train_batch_size == workload.micro_batch
    assert (taken.bf16, taken.fp16) == (dtype == "bfloat16", dtype == "float16")
    assert taken.gradient_checkpointing is (mode == "recompute")
    assert taken.optim == "adamw_torch"


@pytest.mark.parametrize(
    ("workload", "strategy", "named"),
    [
        (on(tensor=2), Strategy(), "tensor=2"),
        (on(pipeline=2), Strategy(), "pipeline=2"),
        (on(context=2), Strategy(), "context=2"),
        (
            replace(on(zero_stage=2), framework="torch"),
            Strategy(),
            "zero_stage=2 of a Trainer needs framework='deepspeed', not 'torch'",
        ),
        (
            WORKLOAD,
            Strategy(activations="recompute", recompute=(0, 1)),
            r"recompute=\(0, 1\): a Trainer runs all layers again, or none",
        ),
    ],
)
def test_what_a_trainer_cannot_do_is_refused_in_one_line(
    workload: Workload, strategy: Strategy, named: str
) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        emit_transformers(workload, strategy)
    assert "\n" not in str(caught.value)
