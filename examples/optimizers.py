"""The optimizer of a run: PyTorch's own, or one whose states lie where the flags say."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from flags import one_of
from torch import nn

import offload

__all__ = ["add_optimizer_flags", "clip", "learning_rate", "make_optimizer"]


def placement(text: str) -> str:
    """Take where states lie; the type of a flag."""
    try:
        offload.OptimizerConfig(placement=text, path=(".",))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def add_optimizer_flags(add: Callable[..., object]) -> None:
    """List the flags that say where the optimizer's states lie."""
    kinds = one_of("torch", "offload")
    add("--optimizer", type=kinds, default="torch", help="torch, or offload for --optimizer-*")
    where = "auto (host), host, device, ssd (in --offload-path), or shares: host=0.4,ssd=0.6"
    add("--optimizer-placement", type=placement, metavar="WHERE", help=where)


def make_optimizer(
    args: argparse.Namespace, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return AdamW with weight decay for matrices only; a plan's settings come before the flags'.

    Raises OSError where the states do not fit on the SSD.
    """
    decayed = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1}
    others = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    groups, betas = [decayed, others], (0.9, 0.95)
    if args.optimizer == "torch":
        # Fused, because the default makes temporary copies of all gradients.
        return torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=True)
    where = args.optimizer_placement or "auto"
    on_ssd = "ssd" in where or "nvme" in where
    path = (args.optimizer_path or args.offload_path) if on_ssd else ()
    names = ("staging_bytes", "spill_bytes", "ssd_write_bytes_per_day", "io_engine")
    settings = {name: getattr(args, name) for name in names} | args.planned_optimizer
    # Gradients that have left are clipped where they are.
    max_norm = (args.max_norm or None) if settings.get("early_gradients") else None
    return offload.AdamW(
        groups,
        lr=args.lr,
        betas=betas,
        placement=where,
        path=path,
        max_norm=max_norm,
        **settings,
    )


def clip(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_norm: float
) -> None:
    """Clip gradients, unless `max_norm` is 0 or the optimizer does so itself."""
    if max_norm and getattr(optimizer, "max_norm", None) is None:
        nn.utils.clip_grad_norm_(parameters, max_norm)


def learning_rate(step: int, num_steps: int, highest: float) -> float:
    """Rise over the first tenth of the steps, then follow a cosine down to a tenth of `highest`."""
    warmup = max(1, num_steps // 10)
    if step < warmup:
        return highest * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return highest * (0.55 + 0.45 * math.cos(math.pi * progress))
