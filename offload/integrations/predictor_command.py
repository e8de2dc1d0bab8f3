"""`offload tokens train-predictor`: nets that foretell what a model's attention looks at."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from offload.device import has_gpu
from offload.tokens.predictor_file import Provenance, save_predictors
from offload.tokens.predictor_training import PredictorTraining
from perfmodel.token_plan import SparsityRule

__all__ = ["load", "parted", "require_blocks_between", "sequences", "told", "train_predictor"]

_BYTES = 256
_HELD_OUT = 10
"""One in so many sequences is not trained or tuned on: what is said of the outcome is of those."""


def load(name: str) -> tuple[Any, Any]:
    """Return a model of a name, a folder or a config.json (then of its first weights), and what
    makes tokens of a text.
    """
    if not name.endswith(".json"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        models: Any = transformers.AutoModelForCausalLM
        return models.from_pretrained(name), lambda text: tokenizer(text, verbose=False)[
            "input_ids"
        ]
    if not Path(name).is_file():
        raise FileNotFoundError(2, "No such file", name)
    config = transformers.AutoConfig.from_pretrained(name)
    if config.vocab_size < _BYTES:
        raise ValueError(f"{name} has fewer than {_BYTES} tokens, one a byte")
    made: Any = transformers.AutoModelForCausalLM
    return made.from_config(config), lambda text: list(text.encode())


def train_predictor(args: argparse.Namespace) -> int:
    """Train, say how well they recall, and write them; returns the exit status."""
    try:
        folder = Path(args.output).resolve().parent
        if not os.access(folder, os.W_OK):
            raise OSError(13, "cannot be written to", str(folder))
        rule = SparsityRule(
            block_tokens=args.block_tokens,
            ratio=args.ratio,
            pool_tokens=1,
            causal=not args.sees_all,
        )
        require_blocks_between(args.seq_len, rule)
        torch.manual_seed(0)
        model, tokens_of = load(args.model)
        rows = sequences(args.data, tokens_of, args.seq_len)
        _train(args, model, rows, rule)
    except (OSError, ValueError) as error:
        return told(error)
    return 0


def sequences(data: str, tokens_of: Callable[[str], list[int]], seq_len: int) -> list[torch.Tensor]:
    """Return a text as whole sequences [1, tokens]. Raises ValueError for fewer than two."""
    tokens = torch.tensor(tokens_of(Path(data).read_text(encoding="utf-8")))
    rows = [each[None] for each in torch.split(tokens, seq_len) if len(each) == seq_len]
    if len(rows) < 2:
        raise ValueError(f"{data} has {len(tokens)} tokens: two sequences are needed")
    return rows


def require_blocks_between(seq_len: int, rule: SparsityRule) -> None:
    """Raise ValueError for sequences of which every block always stays."""
    if seq_len <= rule.always_tokens:
        raise ValueError(
            f"--seq-len {seq_len} has no block between the first and the last, which always stay: "
            f"give more than {rule.always_tokens}, or a smaller --block-tokens than "
            f"{rule.block_tokens}"
        )


def parted(rows: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return sequences to learn from, and the last ones, by which the outcome is judged."""
    judged = max(1, len(rows) // _HELD_OUT)
    return rows[:-judged], rows[-judged:]


def told(error: OSError | ValueError) -> int:
    """Say in a line what is wrong; returns the exit status."""
    said = str(error)
    if isinstance(error, OSError) and error.filename:
        said = f"{error.filename}: {error.strerror}"
    print(f"offload tokens: {' '.join(said.split())}", file=sys.stderr)
    return 2


def _train(
    args: argparse.Namespace, model: Any, rows: list[torch.Tensor], rule: SparsityRule
) -> None:
    device = torch.device("cuda" if has_gpu() else "cpu")
    learnt, held_out = parted(rows)
    training = PredictorTraining(model.to(device), rule, lr=args.lr)

    def batches(of: list[torch.Tensor], count: int) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(count):
            yield {"input_ids": of[step % len(of)].to(device)}

    step = 0

    def tell(loss: float) -> None:
        nonlocal step
        step += 1
        if sys.stderr.isatty() or step in (1, args.steps):
            end = "\n" if step == args.steps or not sys.stderr.isatty() else ""
            said = f"step {step} of {args.steps}: loss {loss:.4f}"
            print(f"\r{said}", end=end, file=sys.stderr, flush=True)

    try:
        training.train(batches(learnt, args.steps), tell)
        recalls = training.recalls(batches(held_out, min(len(held_out), args.judged)))
    finally:
        training.close()
    made = Provenance(
        **training.sizes,
        causal=rule.causal,
        model=args.model,
        data=args.data,
        steps=args.steps,
        seq_len=args.seq_len,
        recalls={str(number): recall for number, recall in recalls.items()},
    )
    save_predictors(args.output, training.predictors, made)
    print("layer  recall  widths")
    for number, predictor in training.predictors.items():
        widths = [each.shape[0] for name, each in predictor.weights().items() if name[-1] != "2"]
        print(f"{number:<5}  {recalls[number]:6.1%}  {' '.join(map(str, widths))}")
    print(f"the predictors are in {args.output}: tokens.sparse.predictor of a plan")
