"""`--tokens`: the loss and perceptrons part by part, attention to those tokens that matter."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from flags import at_least, one_of
from models import Decoder, GroupedAttention, SelfAttention, perceptrons
from torch import Tensor, nn
from tqdm import tqdm

from offload.tokens import PlainTokens, Tiled, measure_quality, segment_tokens_for
from perfmodel.token_plan import SparsityRule

__all__ = ["add_token_flags", "kept_of", "look", "segment_of", "shorten", "token_problem"]

_CHOOSING = ("sparse", "gradient")
_DECODERS = ("gpt", "llama")


def add_token_flags(add: Callable[..., object]) -> None:
    """List the flags that say what becomes of a long window's tokens."""
    tokens = one_of("off", "exact", *_CHOOSING)
    said = "exact: loss and perceptrons part by part; sparse: attention to tokens that matter; "
    add("--tokens", type=tokens, default="off", help=f"{said}gradient: gradients through those")
    add("--keep", type=float, metavar="RATIO", help="of a window, of those that matter (0.4)")
    add("--meter-steps", type=at_least(0), default=0, help="between looks at quality; 0 for none")


def token_problem(args: argparse.Namespace) -> str:
    """Return in a line why flags about tokens do not go together; nothing where they do."""
    if args.framework == "megatron" and args.tokens != "off":
        return "--tokens is nothing to --framework megatron; leave it out"
    if args.tokens in _CHOOSING and args.model not in _DECODERS:
        return f"--tokens {args.tokens} is for {' and '.join(_DECODERS)}, not --model {args.model}"
    if args.tokens in _CHOOSING and args.offload == "auto":
        return f"--tokens {args.tokens} does not go with --offload auto; use ssd or recompute"
    if args.keep is not None and args.tokens not in _CHOOSING:
        return f"--keep is nothing to --tokens {args.tokens}; use it with sparse"
    if args.keep is not None and not 0 < args.keep <= 1:
        return f"--keep {args.keep:g} is not over 0 and at most 1"
    if args.meter_steps and args.tokens not in _CHOOSING:
        return f"--meter-steps is nothing to --tokens {args.tokens}; use it with sparse"
    return _too_short(args) if args.tokens in _CHOOSING else ""


def _too_short(args: argparse.Namespace) -> str:
    """Return in a line why nothing of a window can be left out; nothing where it can."""
    rule = SparsityRule()
    if args.seq_len > rule.always_tokens:
        return ""
    return (
        f"--seq-len {args.seq_len} leaves nothing out with --tokens {args.tokens}, which keeps the "
        f"first and last {rule.block_tokens} tokens; take more than {rule.always_tokens}"
    )


def segment_of(mode: str, vocab_size: int) -> int:
    """Return how many tokens' logits are to be there at once; 0: all."""
    return 0 if mode == "off" else segment_tokens_for(vocab_size)


def look(trainer: Any, step: int, micro: int, batch: tuple[Tensor, Tensor]) -> None:
    """Say how far training on what matters is from training on all, where --meter-steps has it.

    Of the first batch that was ever handed over, ahead of a step's first forward; on all ranks.
    """
    args, tokens = trainer.args, trainer.tokens
    if (
        micro
        or tokens is None
        or tokens.is_dense
        or not args.meter_steps
        or step % args.meter_steps
    ):
        return
    if trainer.probe is None:
        parts = (part.to(trainer.device) for part in batch)
        trainer.probe = dict(zip(("tokens", "successors"), parts, strict=True))

    @contextmanager
    def forward() -> Iterator[None]:
        bf16 = torch.autocast(trainer.device.type, torch.bfloat16, args.dtype == "bf16")
        with bf16, trainer.act.forward() if trainer.act else nullcontext():
            yield

    found = measure_quality(trainer.bare, tokens, trainer.probe, around=forward)
    if trainer.rank == 0:
        tqdm.write(f"step {step}: {found.text()}")


def kept_of(trainer: Any) -> dict[str, str]:
    """Return how much of the tokens the last forward kept, to be shown; nothing if always all."""
    tokens: PlainTokens | None = getattr(trainer, "tokens", None)
    return {} if tokens is None else {"kept": f"{tokens.kept_share:.0%}"}


def shorten(args: argparse.Namespace, model: nn.Module) -> PlainTokens | None:
    """Have perceptrons run in tiles, and attention over what matters, as the flags say.

    Tiles are of --hidden tokens, and with recompute run once more in the backward.
    """
    for part in perceptrons(model) if args.tokens != "off" else ():
        Tiled(part, args.hidden, again=args.offload == "recompute")
    if args.tokens not in _CHOOSING or not isinstance(model, Decoder):
        return None
    attentions = [
        part for part in model.modules() if isinstance(part, SelfAttention | GroupedAttention)
    ]
    for each in attentions:
        if isinstance(each, GroupedAttention):
            each.placed = True
    rule = SparsityRule(ratio=args.keep or SparsityRule.ratio)
    tokens = PlainTokens(model, attentions, rule, gradient_only=args.tokens == "gradient")
    run = model.run

    def carried(layer: Any, *inputs: Any) -> Any:
        return run(tokens.carrying(layer), *inputs)

    model.run = carried
    return tokens
