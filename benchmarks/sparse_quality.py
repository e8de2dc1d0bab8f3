"""What leaving tokens out costs: a model trained here, fine-tuned densely and sparsely.

A small Llama learns Python's source from nothing (`benchmarks.first_model`). Then adapters of it
learn the prose of Python's reference at a longer one, with every token in attention and with blocks
left out, from the same seeds on the same sequences; each result is judged as what it is, a dense
model: by its perplexity on prose that nobody trained on, and by how many values it finds again that
were said of names somewhere before.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.first_model import FirstModel, train_first_model
from benchmarks.needle_text import Sample, code, prose, sample_of
from benchmarks.record import (
    Claim,
    Record,
    add_json_argument,
    exactly,
    positive,
    table,
    write_record,
)
from offload import Session

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
HELD_OUT = 8
"""One in so many bytes of the prose, at its end, nobody trains on."""
GAIN, FOUND = 0.10, 0.80
"""What dense fine-tuning is to reach, so that there is something to be lost."""
WORSE, LOST_GAIN, LOST_FOUND = 0.01, 0.05, 0.02
"""What sparse fine-tuning may give up: of perplexity, of dense's gain, of values found."""


@dataclass(frozen=True)
class Judged:
    """A model, asked."""

    perplexity: float
    """Of a byte of held-out prose, each behind up to a whole sequence."""
    found: float
    """Of the values that were asked for."""


@dataclass
class Seed:
    """One seed's results, by way."""

    judged: dict[str, Judged] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    cosines: list[float] = field(default_factory=list)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_json_argument(parser)
    for flag, default in (
        ("--hidden", 128),
        ("--layers", 8),
        ("--repeated-steps", 800),
        ("--code-steps", 500),
        ("--long-steps", 150),
        ("--steps", 200),
        ("--seq-len", 2048),
        ("--seeds", 3),
        ("--facts", 8),
        ("--judged", 40),
        ("--pool-tokens", 16),
        ("--threads", 2),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"({default})")
    parser.add_argument("--text-bytes", type=positive, metavar="N", help="of the prose (all)")
    parser.add_argument("--ratio", type=float, default=0.4, help="kept in later layers (0.4)")
    parser.add_argument(
        "--dense-last", type=float, default=0.0, metavar="X", help="of the steps, at the end (0)"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="of adapters (2e-3)")
    parser.add_argument("--base", type=Path, help="where the first model is kept, or lies")
    return parser.parse_args()


@torch.no_grad()
def judge(model: Any, text: bytes, args: argparse.Namespace) -> Judged:
    """Ask a model, as it is without anything left out."""
    model.eval()
    rng = random.Random(10_000)
    losses = []
    for begin in range(0, len(text) - args.seq_len, args.seq_len):
        ids = torch.frombuffer(bytearray(text[begin : begin + args.seq_len]), dtype=torch.uint8)
        batch = ids.long()[None]
        losses.append(float(model(input_ids=batch, labels=batch).loss))
    right = asked = 0
    for _ in range(args.judged):
        sample = sample_of(text, args.seq_len, args.facts, rng)
        said = model(input_ids=sample.ids[None]).logits[0].argmax(-1)
        at = torch.tensor(sample.answers)
        asked += len(at)
        right += int((said[at - 1] == sample.ids[at]).sum())
    return Judged(math.exp(statistics.fmean(losses)), right / asked)


def fine_tune(
    base: Any, text: bytes, args: argparse.Namespace, seed: int, way: str, to: Seed
) -> Any:
    """Return `base` with adapters that have learnt prose, densely or sparsely."""
    torch.manual_seed(seed)
    adapters = peft.LoraConfig(r=8, lora_alpha=16, target_modules=[*ADAPTED])
    model: Any = peft.get_peft_model(copy.deepcopy(base), adapters).train()
    plan: dict[str, Any] = {"version": 1, "tokens": {"mode": "exact"}}
    if way == "sparse":
        rule = {"ratio": args.ratio, "pool_tokens": args.pool_tokens}
        rule["dense_from_step"] = args.steps - round(args.dense_last * args.steps)
        rule |= {"most_loss_gap": 1e6, "least_gradient_cosine": -1.0}  # what it does is to be seen
        plan["tokens"] = {"mode": "sparse", "sparse": rule}
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=args.steps, pct_start=0.1
    )
    rng = random.Random(seed)
    losses: list[float] = []
    with Session(model, plan) as session, tqdm(total=args.steps, desc=f"{way} {seed}") as bar:
        for step in range(args.steps):
            sample: Sample = sample_of(text, args.seq_len, args.facts, rng)
            with session.forward():
                loss = model(**sample.batch()).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            if way == "sparse" and (step + 1) % max(1, args.steps // 4) == 0:
                quality = session.measure_quality(sample.batch())
                to.cosines.append(quality.gradient_cosine)
                bar.write(f"step {step + 1}: {quality.text()}")
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    to.losses[way] = losses
    return model


def claims_of(first: Judged, seeds: list[Seed]) -> list[Claim]:
    """Return what was to be shown, of each seed."""
    claims = []
    for number, seed in enumerate(seeds):
        dense, sparse = seed.judged["dense"], seed.judged["sparse"]
        gain = 1 - dense.perplexity / first.perplexity
        gained = math.log(first.perplexity / dense.perplexity)
        kept = math.log(first.perplexity / sparse.perplexity)
        figures: tuple[tuple[str, Literal["at least", "at most"], float, float], ...] = (
            ("dense: perplexity gained", "at least", GAIN, gain),
            ("dense: values found", "at least", FOUND, dense.found),
            (
                "sparse: perplexity, over dense's",
                "at most",
                1 + WORSE,
                sparse.perplexity / dense.perplexity,
            ),
            ("sparse: of dense's gain given up", "at most", LOST_GAIN, 1 - kept / gained),
            ("sparse: values lost", "at most", LOST_FOUND, dense.found - sparse.found),
        )
        claims += [
            Claim(
                name=f"seed {number}, {name}",
                sense=sense,
                goal=goal,
                interval=exactly(value),
                exact=True,
            )
            for name, sense, goal, value in figures
        ]
    return claims


def make_record(first: Judged, seeds: list[Seed], settings: dict[str, object]) -> Record:
    """Put the figures and the claims together."""
    worst = max(
        seed.judged["sparse"].perplexity / seed.judged["dense"].perplexity for seed in seeds
    )
    return Record(
        claim="adapters learn the same with tokens left out of attention",
        goal=f"perplexity within {WORSE:.0%} of dense's, {LOST_GAIN:.0%} of its gain and "
        f"{LOST_FOUND:.0%} of values given up at most",
        claims=claims_of(first, seeds),
        value=worst,
        floor=None,
        peers={"first model's perplexity": first.perplexity, "first model's found": first.found},
        noise={},
        samples={
            str(number): {
                "judged": {way: vars(each) for way, each in seed.judged.items()},
                "losses": seed.losses,
                "cosines": seed.cosines,
            }
            for number, seed in enumerate(seeds)
        },
        settings=settings,
    )


def main() -> None:
    """Train, judge and record; exits with 0 whether the goals are met or not."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    text = prose().encode()[: args.text_bytes]
    cut = len(text) * (HELD_OUT - 1) // HELD_OUT
    learnt, held_out = text[:cut], text[cut:]
    if args.base is not None and args.base.is_dir():
        base: Any = transformers.LlamaForCausalLM.from_pretrained(args.base)
    else:
        sizes = (
            "hidden",
            "layers",
            "seq_len",
            "facts",
            "repeated_steps",
            "code_steps",
            "long_steps",
        )
        first_model = FirstModel(**{key: getattr(args, key) for key in sizes})
        base = train_first_model(first_model, code().encode())
        if args.base is not None:
            base.save_pretrained(args.base)
    first = judge(base, held_out, args)
    print(f"first model: {first}")
    seeds = [Seed() for _ in range(args.seeds)]
    for number, seed in enumerate(seeds):
        for way in ("dense", "sparse"):
            model = fine_tune(base, learnt, args, number, way, seed)
            seed.judged[way] = judge(model, held_out, args)
            print(f"seed {number}, {way}: {seed.judged[way]}")
    rows = [
        [f"{number}, {way}", f"{each.perplexity:.4f}", f"{each.found:.1%}"]
        for number, seed in enumerate(seeds)
        for way, each in [("first", first), *seed.judged.items()]
    ]
    print(table(["", "perplexity", "found"], rows), end="\n\n")
    told = {key: each for key, each in vars(args).items() if key not in ("base", "json", "seeds")}
    write_record(make_record(first, seeds, told), args.json)


if __name__ == "__main__":
    main()
