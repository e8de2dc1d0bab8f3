"""Megatron's flags name what its own classes have, and are read as what they were written of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perfmodel.emit_megatron import emit_megatron
from perfmodel.megatron_arguments import workload_of_megatron
from perfmodel.model import Model
from perfmodel.plain_models import plain_model
from perfmodel.workload import Parallel, Strategy, Workload
from tests.perfmodel.workloads import strategies, tried, workloads

MODEL = Model(num_layers=8, hidden_size=64, num_heads=4, vocab_size=100)
WORKLOAD = Workload(model=MODEL, seq_len=32, micro_batch=2, accumulation=4, framework="megatron")
MANY_REFUSED = settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


def on(**parallel: Any) -> Workload:
    return replace(WORKLOAD, parallel=Parallel(**parallel))


def plain(kind: str) -> Model:
    return plain_model(kind, num_layers=2, hidden_size=64, num_heads=4, seq_len=32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Workload, Strategy, list[str]]:
    """Workloads and strategies that Megatron can do, with their flags."""
    workload = draw(workloads("megatron"))
    strategy = draw(strategies(workload.model.num_layers))
    return workload, strategy, tried(emit_megatron, workload=workload, strategy=strategy)


@MANY_REFUSED
@given(cases())
def test_flags_are_read_as_the_workload_they_were_written_of(
    case: tuple[Workload, Strategy, list[str]],
) -> None:
    workload, _strategy, flags = case
    model, parallel = workload.model, workload.parallel
    read = workload_of_megatron(flags, world_size=parallel.ranks)
    rows = -(-model.vocab_size // parallel.tensor) * parallel.tensor
    assert read == replace(
        workload,
        model=replace(
            model,
            name="megatron",
            vocab_size=rows,
            max_positions=max(model.max_positions, workload.seq_len),
        ),
        # Of one rank there is nothing to share, and Megatron switches it off.
        parallel=replace(parallel, sequence=parallel.sequence and parallel.tensor > 1),
    )


# What only Megatron-LM's own command line has, and what makes of it fields of Megatron-core.
OF_THE_COMMAND_LINE = {
    *("--vocab-size", "--make-vocab-size-divisible-by", "--seq-length", "--ckpt-format"),
    *("--micro-batch-size", "--global-batch-size", "--max-position-embeddings"),
    *("--position-embedding-type", "--untie-embeddings-and-output-weights"),
    *("--group-query-attention", "--no-bias-gelu-fusion", "--swiglu", "--disable-bias-linear"),
    *("--num-virtual-stages-per-pipeline-rank", "--num-experts", "--rotary-percent"),
}


def valued(flags: Sequence[str]) -> dict[str, Any]:
    """Return the flags with their values; True where they have none."""
    found: dict[str, Any] = {}
    for flag, value in zip(flags, [*flags[1:], "--"], strict=True):
        if flag.startswith("--"):
            found[flag] = True if value.startswith("--") else value
    return found


def fields_of(kind: Any, flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that are fields of a class of Megatron-core's, in the fields' types."""
    found = {}
    for one in dataclasses.fields(kind):
        value = flags.get(f"--{one.name.replace('_', '-')}")
        if value is not None:
            # Annotations are types, Optional ones or strings; the value itself says which.
            number = isinstance(value, str) and value.replace(".", "", 1).isdigit()
            found[one.name] = (float(value) if "." in value else int(value)) if number else value
    return found


@pytest.mark.filterwarnings("ignore::UserWarning:megatron")
@MANY_REFUSED
@given(cases())
def test_megatron_core_takes_every_flag_that_is_emitted(
    case: tuple[Workload, Strategy, list[str]],
) -> None:
    pytest.importorskip("megatron.core")
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    workload, strategy, words = case
    flags = valued(words)
    own = fields_of(TransformerConfig, flags)
    shared = fields_of(DistributedDataParallelConfig, flags)
    updates = fields_of(OptimizerConfig, flags)
    known = {f"--{name.replace('_', '-')}" for name in {**own, **shared, **updates}}
    assert set(flags) - known <= OF_THE_COMMAND_LINE

    # What Megatron-LM's `core_transformer_config_from_args` makes of the rest.
    if "--swiglu" in flags:
        own |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    if "attention_backend" in own:
        own["attention_backend"] = AttnBackend[own["attention_backend"]]
    stages = flags.get("--num-virtual-stages-per-pipeline-rank")
    taken = TransformerConfig(
        **own,
        add_bias_linear="--disable-bias-linear" not in flags,
        num_moe_experts=int(flags["--num-experts"]) if "--num-experts" in flags else None,
        virtual_pipeline_model_parallel_size=int(stages) if stages else None,
        pipeline_dtype=torch.bfloat16,
    )
    DistributedDataParallelConfig(**shared)
    model, parallel = workload.model, workload.parallel
    assert taken.num_layers == model.num_layers
    assert (taken.kv_channels, taken.num_query_groups) == (model.head_size, model.num_kv_heads)
    assert taken.ffn_hidden_size == model.ffn_size
    assert taken.gated_linear_unit is model.gated
    assert taken.sequence_parallel is (parallel.sequence and parallel.tensor > 1)
    assert taken.context_parallel_size == parallel.context
    # Transformer Engine has this one, and is not here.
    updates.pop("use_precision_aware_optimizer", None)
    host = OptimizerConfig(**updates)
    assert host.optimizer_cpu_offload is ("host" in strategy.shares)
    assert host.optimizer_offload_fraction == strategy.shares.get("host", 0.0)


def test_both_dropouts_are_said() -> None:
    model = replace(MODEL, dropout=0.2, attention_dropout=0.0)
    flags = valued(emit_megatron(replace(WORKLOAD, model=model), Strategy()))
    assert (flags["--hidden-dropout"], flags["--attention-dropout"]) == ("0.2", "0.0")


@pytest.mark.parametrize(
    ("parallel", "layers", "said"),
    [
        ({}, None, ["uniform", "1"]),
        ({}, (0, 1, 2), ["block", "3"]),
        ({"pipeline": 2}, (0, 4), ["block", "1"]),
        ({"pipeline": 2, "chunks": 2}, (0, 2, 4, 6), ["block", "1"]),
    ],
)
def test_the_first_layers_of_each_part_can_be_run_again(
    parallel: dict[str, Any], layers: tuple[int, ...] | None, said: list[str]
) -> None:
    strategy = Strategy(activations="recompute", recompute=layers)
    flags = valued(emit_megatron(on(**parallel), strategy))
    assert flags["--recompute-granularity"] == "full"
    assert [flags["--recompute-method"], flags["--recompute-num-layers"]] == said


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (plain_model("t5", num_layers=2, hidden_size=64, num_heads=4, seq_len=32), "encoder_lay"),
        (
            plain_model("bert", num_layers=2, hidden_size=64, num_heads=4, seq_len=32),
            "causal=False",
        ),
        (replace(MODEL, parallel_residual=True), "parallel_residual=True"),
        (replace(MODEL, positions="relative"), "positions='relative'"),
        (replace(MODEL, activation="relu"), "activation='relu' with gated=False"),
        (replace(MODEL, gated=True), "activation='gelu' with gated=True"),
        (replace(MODEL, ffn_bias=False, activation="gelu_tanh"), "gelu_tanh' without a bias"),
        (replace(MODEL, attention_bias=False), "attention_bias, output_bias, ffn_bias=False"),
        (replace(MODEL, head_bias=True), "head_bias=True"),
        (replace(MODEL, embedding_size=32), "embedding_size=32"),
        (replace(MODEL, max_positions=16), "max_positions=16 are fewer than seq_len=32"),
    ],
)
def test_models_that_megatron_has_no_flags_for_are_refused(model: Model, named: str) -> None:
    workload = Workload(model=model, seq_len=32, framework="megatron")
    with pytest.raises(ValueError, match=named) as caught:
        emit_megatron(workload, Strategy())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("workload", "strategy", "named"),
    [
        (on(pipeline=3), Strategy(), "pipeline=3 with chunks=1 do not divide num_layers=8"),
        (
            replace(on(pipeline=2, chunks=2), accumulation=3),
            Strategy(),
            "accumulation=3 is not a multiple of pipeline=2",
        ),
        (replace(on(context=2), seq_len=30), Strategy(), "twice context=2"),
        (on(pipeline=2, zero_stage=2), Strategy(), "zero_stage=2 does not go with pipeline=2"),
        (replace(WORKLOAD, lora_rank=8), Strategy(), "lora_rank=8"),
        (
            replace(on(tensor=2), model=replace(MODEL, num_experts=4)),
            Strategy(),
            "num_experts=4 with tensor=2 needs sequence=True",
        ),
        (on(zero_stage=1), Strategy(placement="ssd"), "placement='ssd'"),
        (on(), Strategy(placement="host"), "placement='host' needs zero_stage=1"),
        (on(), Strategy(activations="recompute", recompute=(1,)), r"recompute=\(1,\)"),
        (
            on(pipeline=2),
            Strategy(activations="recompute", recompute=(0, 1)),
            r"recompute=\(0, 1\): .* of each of 2 parts",
        ),
    ],
)
def test_what_megatron_cannot_do_is_refused_in_one_line(
    workload: Workload, strategy: Strategy, named: str
) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        emit_megatron(workload, strategy)
    assert "\n" not in str(caught.value)
