"""A small Llama of bytes that learns, from nothing, to read code and to find again what was said.

To look something up is a habit that a model of this size finds late, if at all, in text where it
pays once in hundreds of bytes. So it comes first, where nothing else is to be learnt: short strings
that are said again. Code comes after it, and at last code as long as what is asked for later, since
positions that were never trained mean nothing to a model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm

from benchmarks.needle_text import Sample, repeated, sample_of

__all__ = ["FirstModel", "train_first_model"]

REPEATED_LEN = 64
REPEATED_BATCH = 32
HEAD_CHANNELS = 32
WARM_UP_STEPS = 100
FOUND = 0.97
"""Of what was said before, until which strings are repeated."""


@dataclass(frozen=True)
class FirstModel:
    """What is trained, and for how long."""

    hidden: int
    layers: int
    seq_len: int
    """Of the last steps, bytes."""
    facts: int
    """In each sequence of code."""
    repeated_steps: int
    """At most."""
    code_steps: int
    long_steps: int
    code_len: int = 256
    code_batch: int = 8
    """Sequences of a step with code; with longer ones, as many bytes."""
    lr: float = 2e-3


def train_first_model(of: FirstModel, text: bytes) -> Any:
    """Return a Llama that has learnt repeated strings, code, and long code, in this order."""
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config_of(of)).train()
    rng = random.Random(0)

    def strings() -> list[Sample]:
        return [repeated(REPEATED_LEN, rng) for _ in range(REPEATED_BATCH)]

    def code(length: int) -> list[Sample]:
        count = max(1, of.code_len * of.code_batch // length)
        return [sample_of(text, length, of.facts, rng) for _ in range(count)]

    _train(model, "repeated", of.repeated_steps, of.lr, strings, until_found=FOUND)
    short, long = (partial(code, length) for length in (of.code_len, of.seq_len))
    _train(model, "code", of.code_steps, of.lr, short)
    _train(model, "long code", of.long_steps, of.lr / 2, long)
    return model


def config_of(of: FirstModel) -> transformers.LlamaConfig:
    """Return the model's configuration."""
    return transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=of.hidden,
        intermediate_size=3 * of.hidden,
        num_hidden_layers=of.layers,
        num_attention_heads=of.hidden // HEAD_CHANNELS,
        max_position_embeddings=of.seq_len,
        use_cache=False,
    )


def _train(
    model: Any,
    name: str,
    steps: int,
    lr: float,
    batch: Callable[[], list[Sample]],
    *,
    until_found: float | None = None,
) -> None:
    """Take so many steps on text and answers; or on answers alone, until so many are found."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)

    def factor(step: int) -> float:
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        return warm_up if until_found is not None else warm_up * (1 - step / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    recent = 0.0
    with tqdm(total=steps, desc=name) as bar:
        for _ in range(steps):
            samples = batch()
            ids = torch.stack([sample.ids for sample in samples])
            logits = model(input_ids=ids).logits.float()
            loss, found = _answers(logits, samples)
            if until_found is None:
                loss = loss + F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            recent += (found - recent) / 20
            bar.set_postfix(loss=f"{loss.item():.3f}", found=f"{recent:.0%}", refresh=False)
            bar.update()
            if until_found is not None and recent >= until_found:
                return


def _answers(logits: Tensor, samples: list[Sample]) -> tuple[Tensor, float]:
    """Return the loss of what was asked alone, and what part of it was right."""
    said = torch.cat(
        [own[torch.tensor(sample.answers) - 1] for own, sample in zip(logits, samples, strict=True)]
    )
    right = torch.cat([sample.ids[torch.tensor(sample.answers)] for sample in samples])
    found = (said.argmax(-1) == right).float().mean()
    return F.cross_entropy(said, right), float(found)
