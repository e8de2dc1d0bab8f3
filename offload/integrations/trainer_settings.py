"""What a Trainer is told that does not go with a plan, refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload.config import Plan
from offload.integrations.deepspeed_config import SECTION

__all__ = [
    "STOCK_NAMES",
    "require_arguments",
    "require_no_recompute",
    "require_no_section",
    "require_one_runs_states",
    "require_own_loss",
]

STOCK_NAMES = ("optimizer.pt", "optimizer.bin")
"""What a Trainer's own states are called in a checkpoint's folder."""


def require_no_recompute(plan: Plan) -> None:
    """Raise ValueError where layers are to be run again: a Trainer is told that otherwise."""
    if plan.activations.mode == "recompute" or plan.activations.recompute:
        raise ValueError(
            "the plan runs layers again, which a Trainer does by gradient_checkpointing=True: set "
            "that, and leave mode and recompute out"
        )


def require_arguments(plan: Plan, args: Any) -> None:
    """Raise ValueError for a Trainer's arguments that do not go with what the plan does."""
    moves, cuts = plan.activations.offload is not None, plan.tokens.mode != "off"
    if moves and getattr(args, "activation_offloading", False):  # TRL's
        raise ValueError(
            "activation_offloading=True and the plan both move activations: remove the first"
        )
    if cuts and getattr(args, "fsdp", None):
        raise ValueError(
            f"fsdp={args.fsdp!r} shares the head over ranks, and tokens.mode={plan.tokens.mode!r} "
            "needs it whole: leave one out"
        )
    if (moves or cuts) and args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs of one process run a model in threads, where no plan reaches what "
            "it saves: start a process for each, by torchrun"
        )


def require_own_loss(plan: Plan, args: Any, loss: Any = None) -> None:
    """Raise ValueError where the Trainer makes a loss of logits, which segments leave none of."""
    if plan.tokens.mode == "off":
        return
    named = {"label_smoothing_factor": args.label_smoothing_factor, "compute_loss_func": loss}
    for key, value in named.items():
        if value:
            raise ValueError(
                f"{key}={value!r} needs all logits at once, and the plan has tokens.mode="
                f"{plan.tokens.mode!r}, which makes the loss without them: leave one out"
            )


def require_no_section(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a plan in a DeepSpeed config that nobody reads it from."""
    if SECTION in config:
        raise ValueError(
            f"the DeepSpeed config has a section {SECTION!r}, which only "
            "offload.integrations.deepspeed.initialize reads: hand it to the Trainer as plan=, "
            'with "version": 1, and take it out there'
        )


def require_one_runs_states(file: Path) -> None:
    """Raise ValueError for a Trainer's own states beside ours: one of them is another run's."""
    for other in (file.with_name(name) for name in STOCK_NAMES):
        if other.is_file():
            raise ValueError(
                f"{file} and {other.name} beside it are states of two runs: remove the one that "
                "does not belong to the weights"
            )
