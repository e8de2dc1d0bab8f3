"""Flags of Megatron-LM for a workload and a strategy, as of its release core_v0.16.1.

What Megatron cannot be told is refused, in one line.
"""

from __future__ import annotations

from collections.abc import Iterator

from perfmodel.emit import recomputed_layers
from perfmodel.model import Model
from perfmodel.workload import Strategy, Workload

__all__ = ["emit_megatron", "require_of_megatron"]

SHARDING = {2: "optim_grads", 3: "optim_grads_params"}


def emit_megatron(workload: Workload, strategy: Strategy) -> list[str]:
    """Return the words of Megatron-LM's command line, but for its data and the number of ranks.

    Activations that go to the host or the SSD need no flag: hooks take them, as the plan says.
    States on the host are Megatron's own to move. Its token table is filled up to a multiple of
    the tensor ranks. Raises ValueError where Megatron has no flag for what is meant.
    """
    require_of_megatron(workload, strategy)
    return [
        *_of_model(workload),
        *_of_ranks(workload),
        *_of_recompute(workload, strategy),
        *_of_states(workload, strategy),
    ]


def require_of_megatron(workload: Workload, strategy: Strategy) -> None:
    """Raise ValueError where Megatron has no flag for what is meant."""
    for problem in (
        *_problems_of_model(workload.model),
        *_problems_of_ranks(workload),
        *_problems_of_states(workload, strategy),
    ):
        raise ValueError(problem)
    _of_recompute(workload, strategy)


def _problems_of_model(model: Model) -> Iterator[str]:
    for key, wrong in (
        ("encoder_layers", model.encoder_layers),
        ("causal", not model.causal),
        ("norm_last", model.norm_last),
        ("final_norm", not model.final_norm),
        ("norms_per_layer", model.norms_per_layer not in (0, 2)),
        ("parallel_residual", model.parallel_residual),
        ("positions", model.positions == "relative"),
        ("token_types", model.token_types),
        ("embedding_norm", model.embedding_norm),
        ("embedding_size", model.embedding_size != model.hidden_size),
        ("head_bias", model.head_bias),
        ("head_transform", model.head_transform),
    ):
        if wrong:
            yield f"{key}={getattr(model, key)!r} is not of Megatron's GPT"
    if (model.gated, model.activation) not in (
        (True, "silu"),
        (False, "gelu"),
        (False, "gelu_tanh"),
    ):
        yield (
            f"activation={model.activation!r} with gated={model.gated} has no flag of Megatron's: "
            "silu gated, or gelu"
        )
    if model.activation == "gelu_tanh" and not model.ffn_bias:
        yield "activation='gelu_tanh' without a bias has no flag of Megatron's"
    biases = _biases(model)
    if biases not in ((True, True, True), (True, False, False), (False, False, False)):
        yield (
            "attention_bias, output_bias, ffn_bias={}, {}, {} have no flags of Megatron's: all, "
            "none, or the first".format(*biases)
        )


def _biases(model: Model) -> tuple[bool, bool, bool]:
    output = model.attention_bias if model.output_bias is None else model.output_bias
    return model.attention_bias, output, model.ffn_bias


def _problems_of_ranks(workload: Workload) -> Iterator[str]:
    model, parallel = workload.model, workload.parallel
    tensor, stages = parallel.tensor, parallel.pipeline * parallel.chunks
    if workload.lora_rank:
        yield f"lora_rank={workload.lora_rank}: Megatron-LM trains all parameters"
    if model.num_experts and tensor > 1 and (model.ffn_bias or not parallel.sequence):
        yield (
            f"num_experts={model.num_experts} with tensor={tensor} needs sequence=True and "
            "ffn_bias=False"
        )
    if model.num_layers % stages:
        yield (
            f"pipeline={parallel.pipeline} with chunks={parallel.chunks} do not divide "
            f"num_layers={model.num_layers}"
        )
    if parallel.chunks > 1 and workload.accumulation % parallel.pipeline:
        yield (
            f"accumulation={workload.accumulation} is not a multiple of "
            f"pipeline={parallel.pipeline}, which chunks={parallel.chunks} need"
        )
    if parallel.context > 1 and workload.seq_len % (2 * parallel.context):
        yield (f"seq_len={workload.seq_len} is not a multiple of twice context={parallel.context}")
    positions = model.max_positions or workload.seq_len
    if model.positions == "learned" and positions < workload.seq_len:
        yield f"max_positions={positions} are fewer than seq_len={workload.seq_len}"
    if parallel.zero_stage > 1 and parallel.pipeline > 1:
        yield (
            f"zero_stage={parallel.zero_stage} does not go with pipeline={parallel.pipeline} here; "
            "at most 1"
        )


def _problems_of_states(workload: Workload, strategy: Strategy) -> Iterator[str]:
    stage = workload.parallel.zero_stage
    if "ssd" in strategy.shares:
        yield f"placement={strategy.placement!r}: Megatron has no flag for states on an SSD"
    elif "host" in strategy.shares and stage != 1:
        yield (
            f"placement={strategy.placement!r} needs zero_stage=1 with Megatron, whose distributed "
            f"optimizer it is, not {stage}"
        )


def _of_model(workload: Workload) -> Iterator[str]:
    model = workload.model
    positions = max(model.max_positions, workload.seq_len)
    yield from ("--num-layers", str(model.num_layers))
    yield from ("--hidden-size", str(model.hidden_size))
    yield from ("--ffn-hidden-size", str(model.ffn_size))
    yield from ("--num-attention-heads", str(model.num_heads))
    if model.head_size * model.num_heads != model.hidden_size:
        yield from ("--kv-channels", str(model.head_size))
    if model.num_kv_heads != model.num_heads:
        yield from ("--group-query-attention", "--num-query-groups", str(model.num_kv_heads))
    if model.gated:
        yield "--swiglu"
    elif model.activation == "gelu":
        yield "--no-bias-gelu-fusion"  # the fused kernel is the approximation
    yield from ("--normalization", "RMSNorm" if model.norm == "rms" else "LayerNorm")
    if model.head_norms:
        yield "--qk-layernorm"
    if not model.ffn_bias:
        yield "--disable-bias-linear"
        if model.attention_bias:
            yield "--add-qkv-bias"
    rotary = model.positions == "rotary"
    yield from ("--position-embedding-type", "rope" if rotary else "learned_absolute")
    if rotary and model.rotary_share < 1:
        yield from ("--rotary-percent", str(model.rotary_share))
    yield from ("--max-position-embeddings", str(positions))
    if not model.tied:
        yield "--untie-embeddings-and-output-weights"
    yield from ("--vocab-size", str(model.vocab_size), "--make-vocab-size-divisible-by", "1")
    if model.num_experts:
        yield from ("--num-experts", str(model.num_experts))
        yield from ("--moe-router-topk", str(model.experts_per_token))
        if model.experts_per_token == 1:  # of one alone, a softmax afterwards is always 1
            yield "--moe-router-pre-softmax"
    attention = model.dropout if model.attention_dropout is None else model.attention_dropout
    yield from ("--attention-dropout", str(attention), "--hidden-dropout", str(model.dropout))


def _of_ranks(workload: Workload) -> Iterator[str]:
    parallel = workload.parallel
    sequences = workload.micro_batch * workload.accumulation * parallel.data
    yield from ("--seq-length", str(workload.seq_len))
    yield from ("--micro-batch-size", str(workload.micro_batch))
    yield from ("--global-batch-size", str(sequences))
    yield from {"bfloat16": ["--bf16"], "float16": ["--fp16"]}.get(workload.dtype, [])
    if not workload.fused_attention:
        yield from ("--attention-backend", "unfused")
    yield from ("--tensor-model-parallel-size", str(parallel.tensor))
    yield from ("--pipeline-model-parallel-size", str(parallel.pipeline))
    if parallel.chunks > 1:
        yield from ("--num-virtual-stages-per-pipeline-rank", str(parallel.chunks))
    yield from ("--context-parallel-size", str(parallel.context))
    if parallel.sequence and parallel.tensor > 1:
        yield "--sequence-parallel"
    if parallel.zero_stage:
        yield "--use-distributed-optimizer"
    if parallel.zero_stage in SHARDING:
        yield from ("--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor")
        yield from ("--data-parallel-sharding-strategy", SHARDING[parallel.zero_stage])


def _of_recompute(workload: Workload, strategy: Strategy) -> list[str]:
    """Return the flags for whole layers; Megatron takes the first so many of each part."""
    layers = recomputed_layers(workload, strategy)
    if not layers:
        return []
    flags = ["--recompute-granularity", "full", "--recompute-method"]
    whole = workload.model.num_layers
    if len(layers) == whole:
        return [*flags, "uniform", "--recompute-num-layers", "1"]
    parts = workload.parallel.pipeline * workload.parallel.chunks
    each, size = len(layers) // parts, whole // parts
    first = [part * size + number for part in range(parts) for number in range(each)]
    if list(layers) != first:
        raise ValueError(
            f"recompute={layers}: Megatron runs as many layers again of each of {parts} parts, "
            "the first"
        )
    return [*flags, "block", "--recompute-num-layers", str(each)]


def _of_states(workload: Workload, strategy: Strategy) -> list[str]:
    """Return the flags for states on the host, which Megatron has of its distributed optimizer."""
    share = strategy.shares.get("host", 0.0)
    if not share:
        return []
    return [
        "--optimizer-cpu-offload",
        "--use-precision-aware-optimizer",
        *("--optimizer-offload-fraction", f"{share:g}"),
    ]
