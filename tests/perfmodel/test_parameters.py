"""The tensors of a rank, against live models and what their counts must add up to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from examples.models import MODELS, ModelConfig, call
from perfmodel.known_models import known_models, read_known_model
from perfmodel.layers import CUDA, MEGATRON, TRANSFORMERS, Shape, tape_of
from perfmodel.model import NORMS, POSITIONS, Model
from perfmodel.parameters import Parameter, flat_gradient_count, rank_parameters, zero_count
from perfmodel.plain_models import PLAIN_MODELS, plain_model
from perfmodel.workload import FRAMEWORKS, Parallel, Workload

SIZES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 96,
    "num_heads": 4,
    "seq_len": 64,
    "vocab_size": 500,
}
FLAGS = (
    *("gated", "final_norm", "head_norms", "attention_bias", "output_bias", "ffn_bias"),
    *("embedding_norm", "tied", "head_bias", "head_transform"),
)


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Models with any of the parts that a description knows."""
    numbers: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 6)),
        "encoder_layers": draw(st.integers(0, 3)),
        "hidden_size": 32 * draw(st.integers(1, 4)),
        "num_heads": 8,
        "num_kv_heads": draw(st.sampled_from([1, 2, 8])),
        "ffn_size": 8 * draw(st.integers(1, 30)),
        "vocab_size": draw(st.integers(1, 500)),
        "max_positions": draw(st.integers(0, 50)),
        "relative_buckets": draw(st.integers(0, 8)),
        "token_types": draw(st.integers(0, 2)),
        "embedding_size": draw(st.sampled_from([0, 24])),
        "norms_per_layer": draw(st.sampled_from([0, 4])),
        "num_experts": draw(st.sampled_from([0, 4])),
    }
    flags = {name: draw(st.booleans()) for name in FLAGS}
    names = {
        "norm": draw(st.sampled_from(NORMS)),
        "positions": draw(st.sampled_from(POSITIONS)),
    }
    return Model(**numbers, **flags, **names)


def count(workload: Workload) -> int:
    return sum(each.count for each in rank_parameters(workload))


def live(kind: str) -> nn.Module:
    return MODELS[kind](ModelConfig(**SIZES), call)


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_tensors_are_those_of_a_live_model(kind: str) -> None:
    found = rank_parameters(Workload(model=plain_model(kind, **SIZES), seq_len=64, plain=kind))
    theirs = [tuple(each.shape) for each in live(kind).parameters()]
    assert sorted(each.shape for each in found) == sorted(theirs)


@given(models())
def test_one_rank_has_all_parameters(model: Model) -> None:
    assert count(Workload(model=model, seq_len=64)) == model.num_params


@given(models(), st.sampled_from([2, 4, 8]))
def test_ranks_of_tensor_together_have_all_parameters(model: Model, ranks: int) -> None:
    whole = count(Workload(model=model, seq_len=64))
    part = count(Workload(model=model, seq_len=64, parallel=Parallel(tensor=ranks)))
    assert whole <= ranks * part < ranks * whole


@given(models(), st.data())
def test_the_largest_stage_has_at_least_its_share(model: Model, data: st.DataObject) -> None:
    layers = model.num_layers + model.encoder_layers
    pipeline = data.draw(st.integers(1, layers))
    whole = count(Workload(model=model, seq_len=64))
    parallel = Parallel(pipeline=pipeline)
    assert whole <= pipeline * count(Workload(model=model, seq_len=64, parallel=parallel))


def test_the_largest_stage_has_the_table_where_tokens_are_many() -> None:
    model = plain_model("gpt", **{**SIZES, "vocab_size": 100_000, "num_layers": 5})
    found = rank_parameters(Workload(model=model, seq_len=64, parallel=Parallel(pipeline=2)))
    layer = model.layer_params()
    ends = model.embedding_params, model.head_params
    # Three layers and what stands before them, or two and what stands behind.
    assert sum(each.count for each in found) == max(3 * layer + ends[0], 2 * layer + ends[1])


def test_a_tied_table_is_in_the_last_stage_as_well() -> None:
    model = Model(num_layers=4, hidden_size=64, num_heads=4, vocab_size=9_000, tied=True)
    last = rank_parameters(Workload(model=model, seq_len=64, parallel=Parallel(pipeline=4)))
    assert sum(each.count for each in last if each.name.startswith("tokens")) == 9_000 * 64


def test_stages_with_chunks_have_layers_from_all_over() -> None:
    model = plain_model("gpt", **{**SIZES, "num_layers": 8, "vocab_size": 1})
    parallel = Parallel(pipeline=2, chunks=2)
    found = rank_parameters(Workload(model=model, seq_len=64, parallel=parallel))
    layers = {each.name.split()[1] for each in found if each.name.startswith("layer ")}
    assert layers in ({"0", "1", "4", "5"}, {"2", "3", "6", "7"})


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_adapters_stand_beside_every_map_of_every_layer(kind: str) -> None:
    workload = Workload(model=plain_model(kind, **SIZES), seq_len=64, plain=kind, lora_rank=5)
    found = rank_parameters(workload)
    model: Any = live(kind)
    layers = [*model.encoder, *model.decoder] if kind == "t5" else [*model.layers]
    maps = [
        module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)
    ]
    expected = sum(5 * (each.in_features + each.out_features) for each in maps)
    trained = [each for each in found if each.trained]
    assert sum(each.count for each in trained) == expected
    assert len(trained) == 2 * len(maps)
    frozen = sum(each.count for each in found if not each.trained)
    assert frozen == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", known_models())
def test_adapters_are_those_of_a_tape(name: str, *, shared: bool) -> None:
    model = replace(read_known_model(name), num_layers=2)
    tensor = next(size for size in (2, 5) if model.num_heads % size == 0) if shared else 1
    model = replace(model, encoder_layers=min(2, model.encoder_layers))
    workload = Workload(model=model, seq_len=16, lora_rank=8, parallel=Parallel(tensor=tensor))
    trained = sum(each.count for each in rank_parameters(workload) if each.trained)
    for kernels in (CUDA, MEGATRON, TRANSFORMERS):
        shape = Shape(batch=1, seq_len=16, element_bytes=2, kernels=kernels, tensor=tensor)
        operators = tape_of(model, shape, lora_rank=8).operators
        assert sum(each.param_bytes for each in operators) == 2 * trained


def test_routers_have_no_adapters_and_experts_parts_have_their_own() -> None:
    model = replace(read_known_model("mixtral-8x7b"), num_layers=1)
    found = rank_parameters(Workload(model=model, seq_len=16, lora_rank=4))
    attention = 4 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    experts = 8 * 3 * 4 * (4096 + 14_336)
    assert sum(each.count for each in found if each.trained) == attention + experts


def test_parameters_are_of_the_layer_that_their_name_says() -> None:
    model = plain_model("t5", **SIZES)
    found = {each.layer for each in rank_parameters(Workload(model=model, seq_len=64))}
    assert found == {"", *(f"{kind} {at}" for kind in ("encoder", "layer") for at in range(3))}


@given(
    st.sampled_from(FRAMEWORKS),
    st.integers(0, 3),
    st.integers(1, 40),
    st.lists(st.integers(1, 100), min_size=1, max_size=20),
)
def test_ranks_of_zero_together_have_all(
    framework: str, stage: int, ranks: int, rows: list[int]
) -> None:
    params = [Parameter(str(at), (size, 3)) for at, size in enumerate(rows)]
    total = sum(each.count for each in params)
    workload = Workload(
        model=plain_model("gpt", **SIZES),
        seq_len=64,
        framework=framework,
        parallel=Parallel(data=ranks, zero_stage=stage),
    )
    most = zero_count(workload, params)
    assert total <= most * (ranks if stage else 1)
    assert most <= total + 1  # DeepSpeed's parts are even
    if framework == "deepspeed" and stage in (1, 2):
        assert min(total, most) <= flat_gradient_count(params, ranks) <= total


def test_a_rank_keeps_whole_gradients_of_what_it_has_a_part_of() -> None:
    params = [Parameter("a", (3,)), Parameter("b", (10,)), Parameter("c", (3,))]
    # Parts of 8: the first reaches into a and b, the second into b and c.
    assert flat_gradient_count(params, 2) == 13
    # Parts of 4: a and b, b alone, b alone, b and c.
    assert flat_gradient_count(params, 4) == 13


@pytest.mark.parametrize("shape", [(), (3, 0), (-1,)])
def test_a_shape_that_is_none_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape="):
        Parameter("a", shape)
