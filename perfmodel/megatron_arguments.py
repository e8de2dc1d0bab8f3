"""Workloads by the command line arguments of Megatron-LM, as of its release core_v0.16.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perfmodel.model import Model
from perfmodel.plan import nearest
from perfmodel.workload import Parallel, Workload

__all__ = ["ignored_of_megatron", "workload_of_megatron"]

NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size")
# What is read, and the value that stands for its absence.
READ: Mapping[str, Any] = {
    **dict.fromkeys(NEEDED),
    "ffn_hidden_size": None,
    "kv_channels": None,
    "group_query_attention": False,
    "num_query_groups": 1,
    "swiglu": False,
    "bias_gelu_fusion": True,
    "normalization": "LayerNorm",
    "qk_layernorm": False,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "position_embedding_type": "learned_absolute",
    "use_rotary_position_embeddings": False,
    "rotary_percent": 1.0,
    "max_position_embeddings": None,
    "untie_embeddings_and_output_weights": False,
    "vocab_size": None,
    "padded_vocab_size": None,
    "make_vocab_size_divisible_by": 128,
    "num_experts": None,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": None,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "attention_backend": "auto",
    "global_batch_size": None,
    "world_size": None,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "use_distributed_optimizer": False,
    "use_megatron_fsdp": False,
    "data_parallel_sharding_strategy": "no_shard",
    "bf16": False,
    "fp16": False,
}
# Flags that switch something off, by what they switch.
NEGATED = {
    "disable_bias_linear": "add_bias_linear",
    "no_bias_gelu_fusion": "bias_gelu_fusion",
}
# What would make it another model, or another memory, than a workload can say.
REFUSED = (
    "apply_residual_connection_post_layernorm",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "decoder_num_layers",
    "experimental_attention_variant",
    "fp4_format",
    "fp8_format",
    "heterogeneous_layers_config_path",
    "hybrid_override_pattern",
    "is_hybrid_model",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "mtp_num_layers",
    "multi_latent_attention",
    "pipeline_model_parallel_layout",
    "quick_geglu",
    "rampup_batch_size",
    "squared_relu",
    "use_torch_fsdp2",
    "window_size",
)
# Those of which another value is refused; a workload has no parallel experts, for one.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "normalization": ("LayerNorm", "RMSNorm"),
    "position_embedding_type": ("learned_absolute", "rope"),
    "data_parallel_sharding_strategy": ("no_shard", "optim", "optim_grads", "optim_grads_params"),
    "attention_backend": ("auto", "flash", "fused", "unfused", "local"),
    "expert_model_parallel_size": (1, "1"),
    "moe_layer_freq": (1, "1"),
}
WITHOUT_FUSION = ("unfused", "local")
_STAGES = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}


def _given(args: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by their names with underscores; a flag without a value is True."""
    if isinstance(args, Mapping):
        return {str(key).lstrip("-").replace("-", "_"): value for key, value in args.items()}
    found: dict[str, Any] = {}
    name = ""
    for word in args:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else True
        elif not name:
            raise ValueError(f"{word!r} stands before any flag of Megatron's")
        else:
            found[name] = word if found[name] is True else f"{found[name]} {word}"
    return found


class _Arguments:
    """What is given and read, by name; ValueError for what cannot be read as it must be."""

    def __init__(self, args: Sequence[str] | Mapping[str, Any]) -> None:
        given = _given(args)
        for flag, name in NEGATED.items():
            if flag in given:
                given[name] = not self._as_flag(flag, given.pop(flag))
        for name in REFUSED:
            if given.get(name) not in (None, False):
                raise ValueError(f"--{_dashed(name)} is not what a workload can say")
        for name, allowed in ONLY.items():
            value = given.get(name)
            value = getattr(value, "name", value)  # a member of an enumeration
            if value is not None and value not in allowed:
                said = ", ".join(dict.fromkeys(map(str, allowed)))
                raise ValueError(f"--{_dashed(name)} {value} is not known here; allowed: {said}")
        self._given = {name: value for name, value in given.items() if value is not None}
        self.ignored = tuple(sorted(name for name in given if name not in {*READ, *ONLY}))

    def flag(self, name: str) -> bool:
        return self._as_flag(name, self._given.get(name, READ[name]))

    def text(self, name: str) -> str:
        value = self._given.get(name, READ[name])
        return str(getattr(value, "name", value))

    def number(self, name: str) -> float:
        value = self._given.get(name, READ[name])
        try:
            return float("" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            raise ValueError(f"--{_dashed(name)} {value!r} is no number") from None

    def whole(self, name: str) -> int:
        """Return a whole number; ValueError where it is needed and missing."""
        if name not in self._given and READ[name] is None:
            hint = nearest(_dashed(name), [_dashed(each) for each in self._given])
            raise ValueError(f"--{_dashed(name)} is missing{hint}")
        number = self.number(name)
        if not number.is_integer():
            raise ValueError(f"--{_dashed(name)} {number} is no whole number")
        return int(number)

    def whole_or(self, name: str, otherwise: int) -> int:
        return self.whole(name) if name in self._given else otherwise

    @staticmethod
    def _as_flag(name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"--{_dashed(name)} {value}: it takes no value")
        return value


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def ignored_of_megatron(args: Sequence[str] | Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the arguments that `workload_of_megatron` makes nothing of, sorted."""
    return tuple(_dashed(name) for name in _Arguments(args).ignored)


def workload_of_megatron(
    args: Sequence[str] | Mapping[str, Any], *, world_size: int | None = None
) -> Workload:
    """Return the workload of Megatron-LM's arguments: words of a command line, or by name.

    `world_size`, the ranks of all, is what Megatron has from its launcher; None: as `args` say, or
    one rank of data. Arguments that make no difference are ignored; those that do and cannot be
    said are refused by a ValueError, as are missing ones and wrong values.
    """
    read = _Arguments(args)
    for name in NEEDED:
        read.whole(name)
    parallel = _parallel_of(read, world_size)
    micro, data = read.whole("micro_batch_size"), parallel.data
    sequences = read.whole_or("global_batch_size", micro * data)
    if sequences % (micro * data):
        raise ValueError(
            f"--global-batch-size {sequences} is not a multiple of --micro-batch-size {micro} "
            f"times {data} ranks of data"
        )
    if read.flag("bf16") and read.flag("fp16"):
        raise ValueError("--bf16 and --fp16 contradict each other")
    half = "bfloat16" if read.flag("bf16") else "float16" if read.flag("fp16") else None
    return Workload(
        model=_model_of(read, parallel.tensor),
        seq_len=read.whole("seq_length"),
        micro_batch=micro,
        accumulation=sequences // (micro * data),
        dtype=half or "float32",
        parallel=parallel,
        framework="megatron",
        fused_attention=read.text("attention_backend") not in WITHOUT_FUSION,
    )


def _parallel_of(read: _Arguments, world_size: int | None) -> Parallel:
    shared = {
        "tensor": read.whole("tensor_model_parallel_size"),
        "pipeline": read.whole("pipeline_model_parallel_size"),
        "context": read.whole("context_parallel_size"),
    }
    chunks = read.whole_or("num_virtual_stages_per_pipeline_rank", 1)
    per_chunk = read.whole_or("num_layers_per_virtual_pipeline_stage", 0)
    if per_chunk:
        chunks, left = divmod(read.whole("num_layers"), shared["pipeline"] * per_chunk)
        if left:
            raise ValueError(
                f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide the layers "
                "of a stage"
            )
    stage = int(read.flag("use_distributed_optimizer"))
    if read.flag("use_megatron_fsdp"):
        stage = _STAGES[read.text("data_parallel_sharding_strategy")]
    of_one = Parallel(
        **shared,
        chunks=chunks,
        zero_stage=stage,
        # As Megatron does, which switches it off where nothing is shared.
        sequence=read.flag("sequence_parallel") and shared["tensor"] > 1,
    )
    ranks = world_size if world_size is not None else read.whole_or("world_size", of_one.ranks)
    if ranks < 1 or ranks % of_one.ranks:
        raise ValueError(
            f"world_size={ranks} is not a multiple of the {of_one.ranks} ranks that share a model"
        )
    return Parallel(**{**vars(of_one), "data": ranks // of_one.ranks})


def _vocabulary(read: _Arguments, tensor: int) -> int:
    """Return the rows of the token table; Megatron fills it up to a multiple."""
    padded = read.whole_or("padded_vocab_size", 0)
    if padded:
        return padded
    multiple = read.whole("make_vocab_size_divisible_by") * tensor
    return -(-read.whole("vocab_size") // multiple) * multiple


def _model_of(read: _Arguments, tensor: int) -> Model:
    hidden, heads = read.whole("hidden_size"), read.whole("num_attention_heads")
    gated, biased = read.flag("swiglu"), read.flag("add_bias_linear")
    # Megatron's own: two thirds of four times `hidden`, in steps of 64, where it is gated.
    ffn_size = int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden
    # Its fused kernel, which needs a bias, is the approximation.
    gelu = "gelu_tanh" if biased and read.flag("bias_gelu_fusion") else "gelu"
    groups = read.whole("num_query_groups") if read.flag("group_query_attention") else heads
    ffn_size = read.whole_or("ffn_hidden_size", ffn_size)
    experts = read.whole_or("num_experts", 0)
    # Its older flag stands for the newer one's value.
    rotary = read.flag("use_rotary_position_embeddings")
    rotary = rotary or read.text("position_embedding_type") == "rope"
    dropout, of_scores = read.number("hidden_dropout"), read.number("attention_dropout")
    return Model(
        name="megatron",
        num_layers=read.whole("num_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=groups,
        head_size=read.whole_or("kv_channels", 0),
        ffn_size=read.whole_or("moe_ffn_hidden_size", ffn_size) if experts else ffn_size,
        gated=gated,
        activation="silu" if gated else gelu,
        norm="rms" if read.text("normalization") == "RMSNorm" else "layer",
        head_norms=read.flag("qk_layernorm"),
        attention_bias=biased or read.flag("add_qkv_bias"),
        output_bias=biased,
        ffn_bias=biased,
        positions="rotary" if rotary else "learned",
        rotary_share=read.number("rotary_percent") if rotary else 1.0,
        max_positions=read.whole("max_position_embeddings"),
        vocab_size=_vocabulary(read, tensor),
        tied=not read.flag("untie_embeddings_and_output_weights"),
        num_experts=experts,
        experts_per_token=read.whole("moe_router_topk") if experts else 1,
        dropout=dropout,
        attention_dropout=None if of_scores == dropout else of_scores,
    )
