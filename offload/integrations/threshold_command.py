"""`offload tokens tune-thresholds`: which blocks' scores are too low for a model to miss them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from offload.device import has_gpu
from offload.integrations.predictor_command import (
    load,
    parted,
    require_blocks_between,
    sequences,
    told,
)
from offload.tokens.threshold_tuning import ThresholdTuning, Tried
from perfmodel.token_plan import SparsityRule

__all__ = ["tune"]


def tune(args: argparse.Namespace) -> int:
    """Tune, say what came of it, and write a plan; returns the exit status."""
    try:
        folder = Path(args.output).resolve().parent
        if not os.access(folder, os.W_OK):
            raise OSError(13, "cannot be written to", str(folder))
        rule = SparsityRule(
            block_tokens=args.block_tokens,
            ratio=args.ratio,
            pool_tokens=min(SparsityRule.pool_tokens, args.block_tokens),
            causal=not args.sees_all,
        )
        require_blocks_between(args.seq_len, rule)
        torch.manual_seed(0)
        model, tokens_of = load(args.model)
        _tune(args, model, sequences(args.data, tokens_of, args.seq_len), rule)
    except (OSError, ValueError) as error:
        return told(error)
    return 0


def _tune(
    args: argparse.Namespace, model: torch.nn.Module, rows: list[torch.Tensor], rule: SparsityRule
) -> None:
    device = torch.device("cuda" if has_gpu() else "cpu")
    model = model.to(device)
    learnt, held_out = (
        [{"input_ids": row.to(device), "labels": row.to(device)} for row in part[: args.sequences]]
        for part in parted(rows)
    )
    first, thresholds = _found(args, model, learnt, rule)
    if not any(each > 0 for each in thresholds):
        raise ValueError(
            f"no threshold for {args.model} is over 0, and such a plan leaves nothing out: give "
            f"longer sequences than --seq-len {args.seq_len}, or a larger --cost than {args.cost}"
        )
    judging = ThresholdTuning(model, rule, held_out)
    try:
        judged = {"first": judging.tried(first), "tuned": judging.tried(thresholds)}
    finally:
        judging.close()
    dense = judging.dense_loss
    print(f"of {len(held_out)} sequences that were not tuned on: loss with all tokens: {dense:.4f}")
    for name, found in judged.items():
        print(
            f"{name} thresholds: loss {found.loss:.4f} ({found.loss / dense - 1:+.2%}), "
            f"{found.kept_share:.0%} of tokens kept"
        )
    _write(args.output, rule, thresholds)
    print(f"the plan is in {args.output}")


def _found(
    args: argparse.Namespace, model: torch.nn.Module, batches: list[Any], rule: SparsityRule
) -> tuple[tuple[float, ...], list[float]]:
    """Return thresholds to begin with, and tuned ones, as a plan has them."""
    tries = 0

    def tell(found: Tried) -> None:
        nonlocal tries
        tries += 1
        if sys.stderr.isatty():
            said = f"try {tries}: loss {found.loss:.4f}, {found.kept_share:.0%} of tokens kept"
            print(f"\r{said}", end="", file=sys.stderr, flush=True)

    tuning = ThresholdTuning(model, rule, batches)
    try:
        first = tuning.profile()
        tuned = tuning.tune(first, cost=args.cost, rounds=args.rounds, tell=tell)
    finally:
        tuning.close()
        if tries and sys.stderr.isatty():
            print(file=sys.stderr)
    return first, [float(f"{each:.6g}") for each in tuned]  # of whatever size scores are


def _write(output: str, rule: SparsityRule, thresholds: list[float]) -> None:
    chosen = {
        "block_tokens": rule.block_tokens,
        "pool_tokens": rule.pool_tokens,
        "causal": rule.causal,
        "thresholds": thresholds,
    }
    plan = {"version": 1, "tokens": {"mode": "sparse", "sparse": chosen}}
    part = Path(f"{output}.part")  # an earlier plan stays until this one is whole
    try:
        part.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
