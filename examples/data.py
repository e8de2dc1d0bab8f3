"""Text as tokens: where it comes from, its two splits, and which windows a step trains on.

A token is one byte, or one entry of a `.bin` file of uint16, or of what Megatron has prepared.
Which windows a step gets depends on the seed, the step and the rank only, so that runs can be
compared to the bit.
"""

from __future__ import annotations

import importlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "Batch",
    "Corpus",
    "Tokens",
    "evenly_spaced",
    "load_corpus",
    "random_rows",
    "split_rows",
]

Batch = tuple[torch.Tensor, torch.Tensor]

BYTE_VOCAB_SIZE = 256
VALIDATION_SHARE = 0.05
# What lies in the standard library's folder besides the library: other packages, and tests.
NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class IndexedTokens:
    """All sequences of a dataset, one behind the other, or a part of them; nothing is in memory."""

    dataset: Any
    """Megatron's `IndexedDataset`."""
    starts: NDArray[np.int64]
    """Where each sequence begins, and where the last one ends."""
    begin: int
    end: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of a token."""
        found: np.dtype[Any] = np.dtype(self.dataset.index.dtype)
        return found

    def __len__(self) -> int:
        return self.end - self.begin

    def part(self, begin: int, end: int) -> IndexedTokens:
        """Return tokens `begin` to `end` of these."""
        return IndexedTokens(self.dataset, self.starts, self.begin + begin, self.begin + end)

    def max(self) -> int:
        """Return the greatest token, of those of all parts; reads the dataset once."""
        filled = np.flatnonzero(np.diff(self.starts))
        return max(int(self.dataset[int(number)].max()) for number in filled)

    def rows(self, firsts: NDArray[np.int64], count: int) -> NDArray[Any]:
        """Return `count` tokens from each of `firsts` on: [len(firsts), count]."""
        return np.stack([self._row(self.begin + int(first), count) for first in firsts])

    def _row(self, first: int, count: int) -> NDArray[Any]:
        number = int(np.searchsorted(self.starts, first, side="right")) - 1
        parts = []
        while count:
            offset = first - int(self.starts[number])
            length = min(count, int(self.starts[number + 1]) - first)
            if length:
                parts.append(self.dataset.get(number, offset, length))
            first, count, number = first + length, count - length, number + 1
        return np.concatenate(parts)


Rows = NDArray[Any]
Tokens = NDArray[np.uint8] | NDArray[np.uint16] | IndexedTokens


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on, and the last part of the text, which is only looked at."""

    name: str
    train: Tokens
    validation: Tokens
    vocab_size: int


def load_corpus(source: str, seq_len: int) -> Corpus:
    """Read `stdlib`, a text file, a folder of them, or a `.bin` file of uint16 tokens.

    A `.bin` file with an `.idx` file beside it is a dataset of Megatron's.

    Raises OSError for what cannot be read, ValueError for what is no such data, or is too short
    for one window of `seq_len` tokens and its successors in each split.
    """
    if source == "stdlib":
        tokens = _read_folder(sysconfig.get_path("stdlib"), ".py", NOT_THE_LIBRARY)
    elif os.path.isdir(source):
        tokens = _read_folder(source)
    else:
        tokens = _map_file(source)
    boundary = int(len(tokens) * (1 - VALIDATION_SHARE))
    train, validation = _part(tokens, 0, boundary), _part(tokens, boundary, len(tokens))
    if min(len(train), len(validation)) <= seq_len:
        raise ValueError(
            f"{source} has {len(tokens)} tokens, too few for windows of {seq_len} in a training "
            f"and a validation part ({1 - VALIDATION_SHARE:.0%} and {VALIDATION_SHARE:.0%})"
        )
    vocab_size = BYTE_VOCAB_SIZE
    if tokens.dtype != np.uint8:
        vocab_size = max(vocab_size, int(tokens.max()) + 1)  # reads all of it
    return Corpus(source, train, validation, vocab_size)


def _part(tokens: Tokens, begin: int, end: int) -> Tokens:
    return tokens.part(begin, end) if isinstance(tokens, IndexedTokens) else tokens[begin:end]


def _map_file(source: str) -> Tokens:
    nbytes = os.stat(source).st_size
    if nbytes == 0:
        raise ValueError(f"{source} is empty")
    prefix = source.removesuffix(".bin")
    if prefix != source and os.path.exists(f"{prefix}.idx"):
        return _open_indexed(prefix)
    if not source.endswith(".bin"):
        return np.memmap(source, dtype=np.uint8, mode="r")
    if nbytes % 2:
        raise ValueError(f"{source} has {nbytes} bytes; a .bin file holds tokens of 2 bytes each")
    return np.memmap(source, dtype="<u2", mode="r")


def _open_indexed(prefix: str) -> IndexedTokens:
    """Open `prefix`.bin and `prefix`.idx.

    Raises ValueError where megatron-core is not installed, or they are no such dataset.
    """
    try:
        module = importlib.import_module("megatron.core.datasets.indexed_dataset")
    except ImportError as error:
        raise ValueError(
            f"{prefix}.bin has an .idx beside it, which megatron-core reads ({error}); "
            "pip install megatron-core, or give one without"
        ) from error
    with open(f"{prefix}.idx", "rb") as file:
        if file.read(9) != b"MMIDIDX\x00\x00":
            raise ValueError(f"{prefix}.idx is no index of Megatron's, which begins with MMIDIDX")
    try:
        dataset = module.IndexedDataset(prefix)
        starts = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])
        size = int(starts[-1]) * np.dtype(dataset.index.dtype).itemsize
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"{prefix}.idx is no index of Megatron's: {error}") from error
    with open(f"{prefix}.bin", "rb") as file:
        there = file.seek(0, 2)
    if there < size:
        raise ValueError(f"{prefix}.bin has {there} bytes, and {prefix}.idx says {size}")
    return IndexedTokens(dataset, starts, 0, int(starts[-1]))


def _read_folder(folder: str, suffix: str = "", skip: frozenset[str] = frozenset()) -> Tokens:
    """Read every file under `folder` that ends in `suffix` and is text, in a fixed order."""
    texts: list[bytes] = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skip and name[0] != ".")
        chosen = sorted(name for name in files if name.endswith(suffix) and name[0] != ".")
        texts += [Path(place, name).read_bytes() for name in chosen]
    text = b"\n".join(text for text in texts if b"\0" not in text)
    if not text:
        raise ValueError(f"{folder} holds no text files")
    return np.frombuffer(text, dtype=np.uint8)


def random_rows(tokens: Tokens, seq_len: int, count: int, seed: tuple[int, ...]) -> Rows:
    """Return `count` random windows with one token more each: [count, seq_len + 1].

    They are the same for the same seed.
    """
    starts = np.random.default_rng(seed).integers(len(tokens) - seq_len, size=count)
    return _rows(tokens, seq_len, starts)


def evenly_spaced(tokens: Tokens, seq_len: int, count: int, part: int, num_parts: int) -> Batch:
    """Return every `num_parts`-th of the windows that are spread over all of `tokens`."""
    starts = np.linspace(0, len(tokens) - seq_len - 1, count * num_parts).astype(np.int64)
    return split_rows(_rows(tokens, seq_len, starts[part::num_parts]))


def split_rows(rows: Rows) -> Batch:
    """Return windows as inputs and their successors, int64."""
    batch = torch.from_numpy(rows.astype(np.int64))
    return batch[:, :-1], batch[:, 1:]


def _rows(tokens: Tokens, seq_len: int, starts: NDArray[np.int64]) -> Rows:
    if isinstance(tokens, IndexedTokens):
        return tokens.rows(starts, seq_len + 1)
    rows: Rows = tokens[starts[:, np.newaxis] + np.arange(seq_len + 1)]
    return rows
