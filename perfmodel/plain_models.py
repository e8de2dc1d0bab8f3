"""The models of `examples/train_gpt.py`, by the handful of numbers that it is given."""

from __future__ import annotations

from typing import Any

from perfmodel.layers import Kernels, Shape
from perfmodel.model import Model
from perfmodel.plan import require_choice

__all__ = ["PLAIN_MODELS", "plain_model", "plain_shape"]

PLAIN_MODELS = ("gpt", "bert", "t5", "llama")
# What BERT guesses of all positions.
_MASKED = 0.15


def plain_model(
    kind: str,
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    seq_len: int,
    vocab_size: int = 256,
    dropout: float = 0.0,
) -> Model:
    """Return the description of one of `PLAIN_MODELS`. Raises ValueError for another, or a number.

    `seq_len` is that of a window of tokens, of which T5's encoder has the first half.
    """
    require_choice("model", kind, PLAIN_MODELS)
    own: dict[str, Any] = {}
    if kind == "bert":
        own = {"norm_last": True, "causal": False}
    elif kind == "t5":
        own = {"encoder_layers": num_layers, "norm": "rms", "activation": "relu"}
        own |= {"attention_bias": False, "ffn_bias": False}
    elif kind == "llama":
        group = next(size for size in (4, 3, 2, 1) if num_heads % size == 0)
        own = {"norm": "rms", "positions": "rotary", "gated": True, "activation": "silu"}
        own |= {"attention_bias": False, "ffn_bias": False, "num_kv_heads": num_heads // group}
        own |= {"ffn_size": -(-8 * hidden_size // 3 // 32) * 32}
    return Model(
        name=kind,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        vocab_size=vocab_size,
        max_positions=seq_len,
        dropout=dropout,
        **own,
    )


def plain_shape(
    kind: str, *, batch: int, seq_len: int, element_bytes: int = 4, kernels: Kernels | None = None
) -> Shape:
    """Return how much there is at once of a window of `seq_len` tokens in each of `batch`."""
    return Shape(
        batch=batch,
        seq_len=seq_len // 2 if kind == "t5" else seq_len,
        element_bytes=element_bytes,
        predicted_share=_MASKED if kind == "bert" else 1.0,
        kernels=kernels or Kernels(),
    )
