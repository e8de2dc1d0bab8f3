"""`offload tokens tune-thresholds`: which blocks' scores are too low for a model to miss them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from offload.device import has_gpu
from offload.integrations.predictor_command import load, sequences, told
from offload.tokens.threshold_tuning import ThresholdTuning, Tried
from perfmodel.token_plan import SparsityRule

__all__ = ["tune"]


def tune(args: argparse.Namespace) -> int:
    """Tune, say what came of it, and write a plan; returns the exit status."""
    try:
        folder = Path(args.output).resolve().parent
        if not os.access(folder, os.W_OK):
            raise OSError(13, "cannot be written to", str(folder))
        torch.manual_seed(0)
        model, tokens_of = load(args.model)
        rows = sequences(args.data, tokens_of, args.seq_len)
        rule = SparsityRule(
            block_tokens=args.block_tokens,
            ratio=args.ratio,
            pool_tokens=min(SparsityRule.pool_tokens, args.block_tokens),
            causal=not args.sees_all,
        )
        _tune(args, model, rows[: args.sequences], rule)
    except (OSError, ValueError) as error:
        return told(error)
    return 0


def _tune(
    args: argparse.Namespace, model: torch.nn.Module, rows: list[torch.Tensor], rule: SparsityRule
) -> None:
    device = torch.device("cuda" if has_gpu() else "cpu")
    batches = [{"input_ids": each.to(device), "labels": each.to(device)} for each in rows]
    tuning = ThresholdTuning(model.to(device), rule, batches)
    tries = 0

    def tell(found: Tried) -> None:
        nonlocal tries
        tries += 1
        if sys.stderr.isatty():
            said = f"try {tries}: loss {found.loss:.4f}, {found.kept_share:.0%} of tokens kept"
            print(f"\r{said}", end="", file=sys.stderr, flush=True)

    try:
        first = tuning.profile()
        before = tuning.tried(first)
        thresholds = tuning.tune(first, cost=args.cost, rounds=args.rounds, tell=tell)
        after = tuning.tried(thresholds)
    finally:
        tuning.close()
        if sys.stderr.isatty():
            print(file=sys.stderr)
    print(f"loss with all tokens: {tuning.dense_loss:.4f}")
    for name, found in (("first", before), ("tuned", after)):
        gap = found.loss / tuning.dense_loss - 1
        print(
            f"{name} thresholds: loss {found.loss:.4f} ({gap:+.2%}), "
            f"{found.kept_share:.0%} of tokens kept"
        )
    rounded = [round(each, 6) for each in thresholds]
    chosen = {
        "block_tokens": rule.block_tokens,
        "pool_tokens": rule.pool_tokens,
        "causal": rule.causal,
        "thresholds": rounded,
    }
    plan = {"version": 1, "tokens": {"mode": "sparse", "sparse": chosen}}
    part = Path(f"{args.output}.part")  # an earlier plan stays until this one is whole
    try:
        part.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        os.replace(part, args.output)
    finally:
        part.unlink(missing_ok=True)
    print(f"the plan is in {args.output}")
