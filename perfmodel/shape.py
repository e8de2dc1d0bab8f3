"""How much of a model's input a rank has at once, and in which operators PyTorch computes it."""

from __future__ import annotations

from dataclasses import dataclass

from perfmodel.model import Model
from perfmodel.plan import require_flag, require_whole

__all__ = ["CPU", "CUDA", "MEGATRON", "TRANSFORMERS", "TRANSFORMERS_CUDA", "Kernels", "Shape"]

_MOST = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What PyTorch has one kernel for, and what it keeps there."""

    fused_attention: bool = True
    """Scores are not stored; without: as `softmax(q @ k) @ v` has it, with dropout between."""
    fused_rms_norm: bool = False
    fused_gate: bool = False
    """One kernel activates a gate's part and multiplies with the other; it saves what it reads."""
    mask_bytes: int = 0
    """Of an element that dropout chose; 0: as much as the element."""
    grouped_attention: bool = False
    """That kernel takes fewer heads of keys and values than of queries, which are not repeated."""
    attention_follows_queries: bool = False
    """Its output lies in memory as the queries do."""
    dropping_attention: bool = True
    """That kernel drops scores, or the code does not ask for it."""
    biased_attention: bool = False
    """That kernel gives a gradient to what is added to scores."""
    transformers: bool = False
    """Layers are written as Hugging Face's transformers 5 have them, without autocast."""


CPU = Kernels()
CUDA = Kernels(fused_rms_norm=True, mask_bytes=1)
# As Megatron-LM trains by itself: Transformer Engine's attention, `bias_swiglu_fusion`. A fused
# GELU saves its input alone, which is what any saves.
MEGATRON = Kernels(fused_rms_norm=True, fused_gate=True, mask_bytes=1, grouped_attention=True)
TRANSFORMERS = Kernels(
    grouped_attention=True,
    attention_follows_queries=True,
    dropping_attention=False,
    transformers=True,
)
TRANSFORMERS_CUDA = Kernels(
    mask_bytes=1, grouped_attention=True, biased_attention=True, transformers=True
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How much of a model's input there is at once. Raises ValueError for what does not divide."""

    batch: int
    seq_len: int
    element_bytes: int = 4
    """Of an activation and of a parameter as it is computed with."""
    predicted_share: float = 1.0
    """Which part of all positions reaches the head: BERT's guesses 0.15 of them."""
    kernels: Kernels = CPU
    tensor: int = 1
    """Ranks that share heads, inner channels and the vocabulary, as Megatron has it."""
    sequence: bool = False
    """Those ranks share what lies between the maps as well, along the sequence."""
    context: int = 1
    """Ranks that have a part of each sequence."""

    def __post_init__(self) -> None:
        """Check that every rank gets as much as every other."""
        for key in ("tensor", "context"):
            require_whole(key, getattr(self, key), 1, _MOST)
        require_flag("sequence", self.sequence)
        parts = self.context * (self.tensor if self.sequence else 1)
        if self.seq_len % parts:
            ranks = f"context={self.context}"
            if self.sequence:
                ranks = f"sequence=True with tensor={self.tensor} and {ranks}"
            raise ValueError(f"{ranks} does not divide seq_len={self.seq_len}")
        if self.context > 1 and not self.kernels.fused_attention:
            raise ValueError(
                f"context={self.context} needs fused_attention=True; scores of a part of a "
                "sequence cannot be counted"
            )

    @property
    def tokens(self) -> int:
        """Positions of all sequences."""
        return self.batch * self.seq_len

    @property
    def rows(self) -> int:
        """Positions whose maps a rank computes."""
        return self.tokens // self.context

    @property
    def stream_rows(self) -> int:
        """Positions that a rank has of the residual stream, of norms and of dropout."""
        return self.rows // self.tensor if self.sequence else self.rows

    def check(self, model: Model) -> None:
        """Raise ValueError where ranks cannot share a model evenly."""
        for name in ("num_heads", "ffn_size"):
            if getattr(model, name) % self.tensor:
                raise ValueError(
                    f"tensor={self.tensor} does not divide {name}={getattr(model, name)}"
                )
        if model.num_kv_heads % self.tensor and self.tensor % model.num_kv_heads:
            raise ValueError(
                f"tensor={self.tensor} neither divides num_kv_heads={model.num_kv_heads} nor is a "
                "multiple of it; allowed is either"
            )
        if self.context > 1 and (model.positions == "relative" or model.score_softcap):
            raise ValueError(
                f"context={self.context} needs attention without score_softcap and without "
                "relative positions"
            )
