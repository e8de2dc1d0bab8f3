"""Megatron's command lines are read as it reads them, and what it cannot be said of is refused."""

from __future__ import annotations

from typing import Any

import pytest

from perfmodel.layers import tape_of
from perfmodel.machine import read_machine
from perfmodel.megatron_arguments import ignored_of_megatron, workload_of_megatron
from perfmodel.prediction import shape_of

# Llama 2 7B.
WORDS = (
    *("--num-layers", "32", "--hidden-size", "4096", "--ffn-hidden-size", "11008", "--swiglu"),
    *("--num-attention-heads", "32", "--normalization", "RMSNorm", "--disable-bias-linear"),
    *("--position-embedding-type", "rope", "--rotary-base", "10000", "--use-mcore-models"),
    *("--untie-embeddings-and-output-weights", "--vocab-size", "32000"),
    *("--make-vocab-size-divisible-by", "1", "--tokenizer-type", "Llama2Tokenizer"),
    *("--attention-dropout", "0.0", "--hidden-dropout", "0.0", "--bf16"),
    *("--seq-length", "4096", "--max-position-embeddings", "4096"),
    *("--micro-batch-size", "1", "--global-batch-size", "128", "--sequence-parallel"),
    *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size=2"),
    *("--use-distributed-optimizer", "--lr", "3.0e-4", "--min-lr=3.0e-5"),
    *("--data-path", "0.3", "first", "0.7", "second"),
)
NEEDED = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "micro_batch_size": 2,
    "vocab_size": 256,
}


def test_a_command_line_is_read_as_its_workload() -> None:
    found = workload_of_megatron(WORDS, world_size=16)
    assert found.model.num_params == 6_738_415_616  # as meta-llama/Llama-2-7b-hf has
    assert (found.micro_batch, found.accumulation, found.tokens) == (1, 32, 128 * 4096)
    parallel = found.parallel
    assert (parallel.data, parallel.tensor, parallel.pipeline, parallel.zero_stage) == (4, 2, 2, 1)
    assert parallel.sequence
    assert (found.dtype, found.framework) == ("bfloat16", "megatron")


def test_what_was_ignored_is_said() -> None:
    ignored = ("data-path", "lr", "min-lr", "rotary-base", "tokenizer-type", "use-mcore-models")
    assert ignored_of_megatron(WORDS) == ignored


def test_arguments_are_read_by_name_as_well() -> None:
    names = {**NEEDED, "swiglu": True, "add_bias_linear": False, "window_size": None, "lr": 1e-3}
    dashed = {f"--{name.replace('_', '-')}": value for name, value in names.items()}
    words = [word for name, value in NEEDED.items() for word in (f"--{name}", str(value))]
    found = workload_of_megatron([*words, "--swiglu", "--disable-bias-linear"])
    assert workload_of_megatron(names) == workload_of_megatron(dashed) == found


@pytest.mark.parametrize(
    ("changes", "ffn_size"), [({}, 256), ({"swiglu": True}, 128), ({"ffn_hidden_size": 96}, 96)]
)
def test_the_perceptron_has_megatrons_size(changes: dict[str, Any], ffn_size: int) -> None:
    # 4 × 64; of a gated one two thirds, in whole steps of 64.
    assert workload_of_megatron({**NEEDED, **changes}).model.ffn_size == ffn_size


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 256),
        ({"vocab_size": 257}, 384),
        ({"vocab_size": 257, "tensor_model_parallel_size": 2}, 512),
        ({"vocab_size": 257, "make_vocab_size_divisible_by": 1}, 257),
        ({"vocab_size": None, "padded_vocab_size": 300}, 300),
    ],
)
def test_the_token_table_is_filled_up_as_megatron_does(changes: dict[str, Any], rows: int) -> None:
    assert workload_of_megatron({**NEEDED, **changes}).model.vocab_size == rows


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({}, "gelu_tanh"),
        ({"no_bias_gelu_fusion": True}, "gelu"),
        ({"disable_bias_linear": True}, "gelu"),
        ({"swiglu": True}, "silu"),
    ],
)
def test_the_activation_is_that_of_the_kernel(changes: dict[str, Any], activation: str) -> None:
    assert workload_of_megatron({**NEEDED, **changes}).model.activation == activation


@pytest.mark.parametrize(
    ("changes", "positions", "share"),
    [
        ({}, "learned", 1.0),
        ({"rotary_percent": 0.5}, "learned", 1.0),
        ({"position_embedding_type": "rope"}, "rotary", 1.0),
        ({"use_rotary_position_embeddings": True}, "rotary", 1.0),
        ({"use_rotary_position_embeddings": True, "rotary_percent": "0.25"}, "rotary", 0.25),
        ({"position_embedding_type": "rope", "rotary_percent": 0.5}, "rotary", 0.5),
    ],
)
def test_rotary_positions_have_an_older_flag_and_a_share(
    changes: dict[str, Any], positions: str, share: float
) -> None:
    found = workload_of_megatron({**NEEDED, **changes}).model
    assert (found.positions, found.rotary_share) == (positions, share)
    assert not {"rotary-percent", "use-rotary-position-embeddings"} & {
        *ignored_of_megatron({**NEEDED, **changes})
    }


def test_dropout_of_the_stream_is_apart_from_that_of_scores() -> None:
    def saved_bytes(**changes: Any) -> int:
        found = workload_of_megatron({**NEEDED, **changes})
        machine = read_machine("h100-sxm")
        return tape_of(found.model, shape_of(found, machine)).saved_bytes()

    kept = {"hidden_dropout": 0.0}
    found = workload_of_megatron({**NEEDED, **kept}).model
    assert (found.dropout, found.attention_dropout, found.drops_scores) == (0.0, 0.1, True)
    found = workload_of_megatron({**NEEDED, "attention_dropout": 0.0}).model
    assert (found.dropout, found.drops_scores) == (0.1, False)
    assert workload_of_megatron(NEEDED).model.attention_dropout is None
    # A fused kernel makes the masks of scores again; what else drops keeps a byte of each element:
    # behind the embedding, and twice in each of two layers.
    elements = 5 * NEEDED["hidden_size"] * NEEDED["seq_length"] * NEEDED["micro_batch_size"]
    without = saved_bytes(**kept, attention_dropout=0.0)
    assert saved_bytes(**kept) == without
    assert saved_bytes() == saved_bytes(attention_dropout=0.0) == without + elements
    assert saved_bytes(**kept, attention_backend="unfused") > saved_bytes(
        **kept, attention_dropout=0.0, attention_backend="unfused"
    )


def test_virtual_stages_are_counted_or_sized() -> None:
    changed = {**NEEDED, "num_layers": 8, "pipeline_model_parallel_size": 2}
    counted = workload_of_megatron({**changed, "num_virtual_stages_per_pipeline_rank": 4})
    sized = workload_of_megatron({**changed, "num_layers_per_virtual_pipeline_stage": 1})
    assert counted == sized
    assert counted.parallel.chunks == 4


def test_groups_of_queries_count_only_where_they_are_asked_for() -> None:
    assert workload_of_megatron({**NEEDED, "num_query_groups": 2}).model.num_kv_heads == 4
    grouped = {**NEEDED, "group_query_attention": True}
    assert workload_of_megatron({**grouped, "num_query_groups": 2}).model.num_kv_heads == 2
    assert workload_of_megatron(grouped).model.num_kv_heads == 1


def test_fsdp_shares_what_its_strategy_says() -> None:
    changed = {**NEEDED, "use_megatron_fsdp": True, "use_distributed_optimizer": True}
    for stage, name in enumerate(("no_shard", "optim", "optim_grads", "optim_grads_params")):
        found = workload_of_megatron({**changed, "data_parallel_sharding_strategy": name})
        assert found.parallel.zero_stage == stage


def test_ranks_are_those_of_the_launcher() -> None:
    changed = {**NEEDED, "context_parallel_size": 2}
    assert workload_of_megatron(changed).parallel.data == 1
    assert workload_of_megatron({**changed, "world_size": 8}).parallel.data == 4
    assert workload_of_megatron({**changed, "world_size": 8}, world_size=4).parallel.data == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_layers": None}, "--num-layers is missing"),
        ({"seq_length": None, "seq_lengths": 3}, "--seq-length is missing.*'seq-lengths'"),
        ({"vocab_size": None}, "--vocab-size is missing"),
        ({"max_position_embeddings": None}, "--max-position-embeddings is missing"),
        ({"num_layers": "two"}, "--num-layers 'two' is no number"),
        ({"num_layers": True}, "--num-layers True is no number"),
        ({"num_layers": 2.5}, "--num-layers 2.5 is no whole number"),
        ({"hidden_size": float("inf")}, "--hidden-size inf is no whole number"),
        ({"bf16": "yes"}, "--bf16 yes: it takes no value"),
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16"),
        ({"global_batch_size": 3}, "--global-batch-size 3 is not a multiple"),
        (
            {"world_size": 3, "tensor_model_parallel_size": 2},
            "world_size=3 is not a multiple of the 2",
        ),
        ({"normalization": "BatchNorm"}, "--normalization BatchNorm.*LayerNorm, RMSNorm"),
        ({"position_embedding_type": "yarn"}, "--position-embedding-type yarn"),
        ({"expert_model_parallel_size": 2}, "--expert-model-parallel-size 2"),
        ({"multi_latent_attention": True}, "--multi-latent-attention is not what"),
        ({"squared_relu": True}, "--squared-relu is not what"),
        ({"fp8_format": "e4m3"}, "--fp8-format is not what"),
        ({"num_layers_per_virtual_pipeline_stage": 3}, "--num-layers-per-virtual-pipeline-stage 3"),
        ({"tensor_model_parallel_size": 3}, "tensor=3 does not divide"),
    ],
)
def test_what_is_wrong_or_cannot_be_said_is_named_in_one_line(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        workload_of_megatron({**NEEDED, **changes})
    assert "\n" not in str(caught.value)


def test_a_word_before_any_flag_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'pretrain_gpt\.py' stands before any flag"):
        workload_of_megatron(["pretrain_gpt.py", "--num-layers", "2"])
