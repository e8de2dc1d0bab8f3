"""Text in bytes with sentences to be found again: what is said of a name, and asked later.

Two kinds that come with Python: its library's source, and the prose of its own reference. Into
either sentences are put that give a name a number; somewhere behind, the same name comes again, and
its number can only be known from the first time.
"""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["DIGITS", "Sample", "code", "prose", "sample_of"]

DIGITS = 4
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_IGNORED = -100


def code() -> str:
    """Return the source of Python's library."""
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n".join(each.read_text("utf-8") for each in sorted(folder.glob("*.py")))


def prose() -> str:
    """Return the text of Python's own reference, as `help()` has it."""
    from pydoc_data.topics import topics  # noqa: PLC0415

    return "\n\n".join(topics[key] for key in sorted(topics))


@dataclass(frozen=True)
class Sample:
    """One sequence, with where its questions are answered."""

    ids: Tensor
    """[tokens], bytes."""
    answers: tuple[int, ...]
    """Where the digits of each answer begin."""

    def batch(self) -> dict[str, Tensor]:
        """Return what a causal model takes, with labels everywhere."""
        return {"input_ids": self.ids[None], "labels": self.ids[None]}


def sample_of(text: bytes, length: int, questions: int, rng: random.Random) -> Sample:
    """Return `length` bytes of a text from a random place, with so many sentences, each twice.

    Every sentence's first time is in the first three quarters, and its second at some place behind
    it; the last one is at the very end.
    """
    said = []
    for _ in range(questions):
        name = "".join(rng.choices(_LETTERS, k=4)).capitalize()
        said.append(f"\nThe number of {name} is {rng.randrange(10**DIGITS):0{DIGITS}}.\n".encode())
    size = sum(map(len, said)) * 2
    begin = rng.randrange(len(text) - length)
    plain = text[begin : begin + length - size]
    places: list[tuple[int, int, bytes]] = []
    for n, sentence in enumerate(said):
        first = rng.randrange(len(plain) * 3 // 4)
        again = rng.randrange(first + 1, len(plain) + 1) if n else len(plain)
        places += [(first, 0, sentence), (again, 1, sentence)]
    found, answers, at = bytearray(), [], 0
    for place, time, sentence in sorted(places):
        found += plain[at:place] + sentence
        at = place
        if time:
            answers.append(len(found) - DIGITS - 2)
    found += plain[at:]
    ids = torch.frombuffer(found[:length], dtype=torch.uint8).long()
    return Sample(ids, tuple(answers))
