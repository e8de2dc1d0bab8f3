"""`--tokens exact`: the loss in segments, and perceptrons over a tile of the sequence at a time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

from flags import one_of
from torch import nn

from offload.tokens import Tiled, segment_tokens_for

__all__ = ["add_token_flags", "run_in_tiles", "segment_of"]


def add_token_flags(add: Callable[..., object]) -> None:
    """List the flag that says what becomes of a long window's tokens."""
    tokens = one_of("off", "exact", later=("sparse", "gradient"))
    add("--tokens", type=tokens, default="off", help="exact: loss and perceptrons part by part")


def segment_of(mode: str, vocab_size: int) -> int:
    """Return how many tokens' logits are to be there at once; 0: all."""
    return segment_tokens_for(vocab_size) if mode == "exact" else 0


def run_in_tiles(args: argparse.Namespace, parts: Iterable[nn.Module]) -> None:
    """Have modules run over --hidden tokens at a time, with recompute once more in the backward."""
    for part in parts if args.tokens == "exact" else ():
        Tiled(part, args.hidden, again=args.offload == "recompute")
