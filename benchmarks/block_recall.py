"""How many of the blocks that matter are found by what is cheap, in what part of a step.

The model is one that has learnt (`benchmarks.sparse_quality --base`). LeMo's predictors are trained
beside it, frozen, on prose; then each way of choosing is asked on prose that nobody trained on, and
what it keeps is held against what scores of all tokens would keep. Steps with adapters are timed,
and within them what it takes to choose.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.needle_text import prose, sample_of
from benchmarks.record import (
    Claim,
    Record,
    add_json_argument,
    exactly,
    median_interval,
    positive,
    table,
    write_record,
)
from benchmarks.sparse_quality import ADAPTED, HELD_OUT
from offload import Session
from offload.tokens.predictor_file import Provenance, save_predictors
from offload.tokens.predictor_training import PredictorTraining
from perfmodel.token_plan import SparsityRule

RECALL, SHARE = 0.95, 0.02
FACTS = 8


@dataclass
class Asked:
    """One way of choosing."""

    recalls: list[float] = field(default_factory=list)
    """Of each layer that chooses, in each held-out sequence."""
    shares: list[float] = field(default_factory=list)
    """Of each step's time."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_json_argument(parser)
    parser.add_argument("--base", type=Path, required=True, help="the folder of the first model")
    for flag, default in (
        ("--seq-len", 4096),
        ("--steps", 400),
        ("--train-len", 1024),
        ("--judged", 12),
        ("--threads", 2),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"({default})")
    parser.add_argument("--pools", type=positive, nargs="+", default=[4, 8, 16, 32], metavar="N")
    parser.add_argument("--ratio", type=float, default=0.4, help="kept in later layers (0.4)")
    return parser.parse_args()


def train_predictors(model: Any, text: bytes, args: argparse.Namespace, path: Path) -> None:
    """Train LeMo's nets on the frozen model, and write them."""
    training = PredictorTraining(model, SparsityRule(ratio=args.ratio, pool_tokens=1))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = torch.split(ids, args.train_len)[:-1]
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(rows), (args.steps,), generator=generator).tolist()
    training.train({"input_ids": rows[n][None]} for n in tqdm(order, desc="predictors"))
    training.close()
    made = Provenance(
        **training.sizes,
        causal=True,
        model="benchmarks.sparse_quality",
        data="prose",
        steps=args.steps,
        seq_len=args.train_len,
        recalls={},
    )
    save_predictors(path, training.predictors, made)


def ask(model: Any, rows: list[Tensor], rule: dict[str, Any]) -> Asked:
    """Take a step on each row, and one more in which it is counted what was found."""
    adapters = peft.LoraConfig(r=8, target_modules=[*ADAPTED])
    adapted: Any = peft.get_peft_model(model, adapters).train()
    plan = {"version": 1, "tokens": {"mode": "sparse", "sparse": rule}}
    asked = Asked()
    with Session(adapted, plan) as session:
        sparsity: Any = session.sparsity
        chosen = sparsity._fresh
        spent: list[float] = []

        def timed(*given: Any) -> Any:
            begin = time.perf_counter()
            found = chosen(*given)
            spent.append(time.perf_counter() - begin)
            return found

        sparsity._fresh = timed
        for number, row in enumerate(rows):
            spent.clear()
            begin = time.perf_counter()
            with session.forward():
                loss = adapted(input_ids=row[None], labels=row[None]).loss
            loss.backward()
            step_s = time.perf_counter() - begin
            if number:  # the first one warms up
                asked.shares.append(sum(spent) / step_s)
            sparsity.recalls = [None] * len(sparsity.kept_shares)
            with session.forward():
                adapted(input_ids=row[None], labels=row[None])
            asked.recalls += [each for each in sparsity.recalls if each is not None]
            sparsity.recalls = None
    adapted.unload()
    return asked


def make_record(found: dict[str, Asked], settings: dict[str, object]) -> Record:
    """Put the figures and the claims together."""
    claims = []
    for way, asked in found.items():
        recall = statistics.fmean(asked.recalls)
        claims += [
            Claim(
                name=f"{way}: recall",
                sense="at least",
                goal=RECALL,
                interval=exactly(recall),
                exact=True,
            ),
            Claim(
                name=f"{way}: of a step",
                sense="at most",
                goal=SHARE,
                interval=median_interval(asked.shares),
            ),
        ]
    return Record(
        claim="blocks that matter are found by what is cheap",
        goal=f"{RECALL:.0%} of those that scores of all tokens keep, in {SHARE:.0%} of a step",
        claims=claims,
        value=max(statistics.fmean(asked.recalls) for asked in found.values()),
        floor=None,
        peers={},
        noise={},
        samples={
            way: {"recalls": asked.recalls, "shares": asked.shares} for way, asked in found.items()
        },
        settings=settings,
    )


def main() -> None:
    """Train, ask and record; exits with 0 whether the goals are met or not."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    model: Any = transformers.LlamaForCausalLM.from_pretrained(args.base)
    text = prose().encode("ascii")
    cut = len(text) * (HELD_OUT - 1) // HELD_OUT
    rng = random.Random(1)
    rows = [sample_of(text[cut:], args.seq_len, FACTS, rng).ids for _ in range(args.judged)]
    found: dict[str, Asked] = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "predictors.safetensors"
        train_predictors(model, text[:cut], args, path)
        ways: dict[str, dict[str, Any]] = {
            f"means of {pool}": {"pool_tokens": pool} for pool in args.pools
        }
        ways["predictors"] = {"predictor": str(path)}
        for way, rule in ways.items():
            found[way] = ask(model, rows, {"ratio": args.ratio, **rule})
    lines = [
        [way, f"{statistics.fmean(it.recalls):.1%}", f"{statistics.median(it.shares):.2%}"]
        for way, it in found.items()
    ]
    print(table(["", "recall", "of a step"], lines), end="\n\n")
    keys = ("seq_len", "steps", "train_len", "judged", "ratio")
    write_record(make_record(found, {key: getattr(args, key) for key in keys}), args.json)


if __name__ == "__main__":
    main()
