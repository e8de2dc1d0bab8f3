"""Text in bytes with facts to be found again: what is said of a name, and asked later.

Two kinds that come with Python: its library's source, and the prose of its own reference. Into
either lines are put with a name and its value, a byte each; somewhere behind, the same name comes
again, and its value can only be known from the first time. Names and values are bytes that text in
ASCII does not have, drawn anew for each sequence.
"""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["NAMES", "VALUES", "Sample", "code", "prose", "repeated", "sample_of"]

NAMES, VALUES = range(0x80, 0xC0), range(0xC0, 0x100)


def code() -> str:
    """Return the source of Python's library, in ASCII."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = (each.read_text("utf-8") for each in sorted(folder.glob("*.py")))
    return _plain("\n".join(texts))


def prose() -> str:
    """Return the text of Python's own reference, as `help()` has it, in ASCII."""
    from pydoc_data.topics import topics  # noqa: PLC0415

    return _plain("\n\n".join(topics[key] for key in sorted(topics)))


def _plain(text: str) -> str:
    return text.encode("ascii", "ignore").decode("ascii")


@dataclass(frozen=True)
class Sample:
    """One sequence, with where its questions are answered."""

    ids: Tensor
    """[tokens], bytes."""
    answers: tuple[int, ...]
    """Where the values of names that come again stand."""

    def batch(self) -> dict[str, Tensor]:
        """Return what a causal model takes, with labels everywhere."""
        return {"input_ids": self.ids[None], "labels": self.ids[None]}


def sample_of(text: bytes, length: int, questions: int, rng: random.Random) -> Sample:
    """Return `length` bytes of a text from a random place, with so many facts, each twice.

    A fact's first time is in the first three quarters, and its second at some place behind it; the
    last one asked is at the very end. Raises ValueError for more facts than names or than fit.
    """
    if not 0 < questions <= len(NAMES):
        raise ValueError(f"questions={questions} are not between 1 and {len(NAMES)} names")
    names, values = rng.sample(NAMES, questions), rng.choices(VALUES, k=questions)
    said = [b"\n%c%c\n" % pair for pair in zip(names, values, strict=True)]
    size = sum(map(len, said)) * 2
    if size >= length or len(text) <= length:
        raise ValueError(f"{questions} facts twice and a text of {len(text)} bytes: not {length}")
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
            answers.append(len(found) - len(b"?\n"))
    found += plain[at:]
    return Sample(torch.frombuffer(found, dtype=torch.uint8).long(), tuple(answers))


def repeated(length: int, rng: random.Random) -> Sample:
    """Return `length` names and values in no order, said again after a quarter to half of it.

    Answers are all that was said before.
    """
    period = rng.randrange(length // 4, length // 2)
    said = rng.choices([*NAMES, *VALUES], k=period)
    ids = torch.tensor([said[n % period] for n in range(length)])
    return Sample(ids, tuple(range(period + 1, length)))
