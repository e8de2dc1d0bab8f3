"""What is trained, by how many ranks, and what the user leaves open: model, batch, parallelism."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from perfmodel.model import Model
from perfmodel.plan import (
    DTYPES,
    OptimizerConfig,
    require_choice,
    require_flag,
    require_whole,
)

__all__ = ["DTYPE_BYTES", "FRAMEWORKS", "Parallel", "Strategy", "Workload", "some_batches"]

FRAMEWORKS = ("torch", "deepspeed", "megatron")
DTYPE_BYTES = dict(zip(DTYPES, (4, 2, 2), strict=True))
ACTIVATIONS = ("keep", "recompute", "host", "ssd")
_MOST = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How ranks share a model and its batches. Raises ValueError naming the key and the value."""

    data: int = 1
    zero_stage: int = 0
    """What the ranks of `data` share: 1 optimizer states, 2 gradients too, 3 parameters too."""
    tensor: int = 1
    """Ranks that share each map."""
    sequence: bool = False
    """The ranks of `tensor` share what lies between the maps as well, along the sequence."""
    pipeline: int = 1
    """Ranks that have a part of the layers each."""
    chunks: int = 1
    """Parts of the layers that each of those has (virtual stages); 1: they do not interleave."""
    context: int = 1
    """Ranks that have a part of each sequence."""

    def __post_init__(self) -> None:
        """Check the counts."""
        for key in ("data", "tensor", "pipeline", "chunks", "context"):
            require_whole(key, getattr(self, key), 1, _MOST)
        require_whole("zero_stage", self.zero_stage, 0, 3)
        require_flag("sequence", self.sequence)
        if self.chunks > 1 and self.pipeline == 1:
            raise ValueError(f"chunks={self.chunks} are parts of a stage; pipeline=1 has no stages")
        if self.zero_stage == 3 and self.pipeline > 1:
            raise ValueError(f"zero_stage=3 does not go with pipeline={self.pipeline}; at most 1")

    @property
    def ranks(self) -> int:
        """How many devices it takes."""
        return self.data * self.tensor * self.pipeline * self.context


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step of training. Raises ValueError naming the key, the value and what is allowed."""

    model: Model
    seq_len: int
    micro_batch: int = 1
    """Sequences of a forward, on each rank of `parallel.data`."""
    accumulation: int = 1
    """Forwards of a step."""
    dtype: str = "bfloat16"
    """Of parameters and activations as they are computed with; with a half one the optimizer has an
    fp32 master copy."""
    parallel: Parallel = field(default_factory=Parallel)
    framework: str = "torch"
    fused_attention: bool = True
    """Scores are not stored."""
    lora_rank: int = 0
    """Only matrices of this rank beside each map are trained (LoRA); 0: all parameters are."""
    plain: str = ""
    """Which of `examples/train_gpt.py`'s models it is, if any."""

    def __post_init__(self) -> None:
        """Check the values, also against each other."""
        for key in ("seq_len", "micro_batch", "accumulation"):
            require_whole(key, getattr(self, key), 1, _MOST)
        require_whole("lora_rank", self.lora_rank, 0, _MOST)
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("framework", self.framework, FRAMEWORKS)
        require_flag("fused_attention", self.fused_attention)
        model, parallel = self.model, self.parallel
        for key, whole, name in (
            ("tensor", model.num_heads, "num_heads"),
            ("tensor", model.ffn_size, "ffn_size"),
            ("context", self.seq_len, "seq_len"),
        ):
            if whole % getattr(parallel, key):
                raise ValueError(f"{key}={getattr(parallel, key)} does not divide {name}={whole}")
        if model.num_kv_heads % parallel.tensor and parallel.tensor % model.num_kv_heads:
            raise ValueError(
                f"tensor={parallel.tensor} neither divides num_kv_heads={model.num_kv_heads} nor "
                "is a multiple of it; allowed is either"
            )
        if parallel.sequence and self.seq_len % parallel.tensor:
            raise ValueError(
                f"sequence=True with tensor={parallel.tensor} does not divide "
                f"seq_len={self.seq_len}"
            )
        stages = parallel.pipeline * parallel.chunks
        layers = model.num_layers + model.encoder_layers
        if stages > layers:
            raise ValueError(
                f"pipeline={parallel.pipeline} with chunks={parallel.chunks} are {stages} parts of "
                f"{layers} layers; at most one each"
            )

    @property
    def element_bytes(self) -> int:
        """Of a parameter or an activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def gradient_element_bytes(self) -> int:
        """Of a gradient that ranks add up; Megatron has those of bfloat16 in fp32."""
        wide = self.framework == "megatron" and self.dtype == "bfloat16"
        return DTYPE_BYTES["float32"] if wide else self.element_bytes

    @property
    def tokens(self) -> int:
        """Of a step, on all ranks."""
        return self.seq_len * self.micro_batch * self.accumulation * self.parallel.data

    def with_batch(self, micro_batch: int) -> Workload:
        """Return the same step in forwards of `micro_batch`. Raises ValueError if none is left."""
        sequences = self.micro_batch * self.accumulation
        if sequences % micro_batch:
            raise ValueError(f"micro_batch={micro_batch} does not divide {sequences} sequences")
        return replace(self, micro_batch=micro_batch, accumulation=sequences // micro_batch)

    def to_json(self) -> dict[str, Any]:
        """Return everything that makes it this one, to be written or hashed."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What a planner chooses: where activations and states go. Raises ValueError for wrong ones."""

    activations: str = "keep"
    """`keep`, `recompute`, or the tier that they go to."""
    memory_bytes: int | None = None
    """What saved tensors may take of the device with `host` and `ssd`; None: as little as they can
    without a wait."""
    recompute: tuple[int, ...] | None = None
    """Numbers of the layers that are run again; None: all with `recompute`, else none."""
    optimizer: str = "offload"
    """`offload`, or `torch`: its states are those of torch.optim.AdamW, with the parameters."""
    placement: str = "device"
    """Of optimizer states, as `OptimizerConfig.placement`."""
    update_schedule: str = "auto"
    early_gradients: bool = False
    subgroup_params: int | None = None
    """Of the optimizer's states, as `OptimizerConfig.subgroup_params`."""
    staging_bytes: int = 256 << 20
    """Of activations on their way to the SSD and back."""
    min_tensor_bytes: int = 1 << 20
    """Smaller tensors stay."""

    def __post_init__(self) -> None:
        """Check the values."""
        require_choice("activations", self.activations, ACTIVATIONS)
        require_choice("optimizer", self.optimizer, ("offload", "torch"))
        OptimizerConfig(
            placement=self.placement,
            update_schedule=self.update_schedule,
            subgroup_params=self.subgroup_params,
            path=("ssd",),
        )
        if self.optimizer == "torch" and self.placement != "device":
            raise ValueError(
                f"placement={self.placement!r} is for optimizer='offload'; torch's states are "
                "where the parameters are"
            )

    def with_states_of(self, other: Strategy) -> Strategy:
        """Return this one with the optimizer of `other`, and its states where that has them."""
        names = ("optimizer", "placement", "update_schedule", "early_gradients", "subgroup_params")
        return replace(self, **{name: getattr(other, name) for name in names})

    @property
    def shares(self) -> dict[str, float]:
        """Which part of the optimizer's states lies on each tier."""
        return OptimizerConfig(placement=self.placement, path=("ssd",)).shares


def some_batches(sequences: int, given: int, most: int) -> list[int]:
    """Return micro-batches that divide a step's sequences: all, or about `most` and the given one.

    Those are spread from 1 to all of them.
    """
    low = [size for size in range(1, math.isqrt(sequences) + 1) if sequences % size == 0]
    sizes = sorted({*low, *(sequences // size for size in low)})
    last = len(sizes) - 1
    if last < most:
        return sizes
    some = {sizes[round(at * last / (most - 1))] for at in range(most)}
    return sorted(some | ({given} & {*sizes}))
