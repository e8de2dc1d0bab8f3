"""The examples' data: what is read as text, how it is split, which windows a step gets."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.data import evenly_spaced, load_corpus, random_rows, split_rows


def test_stdlib_is_the_installed_librarys_own_source() -> None:
    corpus = load_corpus("stdlib", seq_len=256)
    text = corpus.train.tobytes() + corpus.validation.tobytes()
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py", "zipimport.py"):
        assert (library / name).read_bytes() in text
    assert (library / "site-packages").is_dir()
    assert b"numpy/__init__" not in text
    assert corpus.vocab_size == 256


def test_stdlib_reads_the_same_every_time() -> None:
    once, again = (load_corpus("stdlib", seq_len=256) for _ in range(2))
    assert np.array_equal(once.train, again.train)
    assert np.array_equal(once.validation, again.validation)


def test_a_folder_is_read_in_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    files = {
        "b.txt": b"second ",
        "a.md": b"first ",
        "tests/c.txt": b"third",
        ".hidden": b"no",
        ".git/config": b"no",
        "image": b"no\0no",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    corpus = load_corpus(str(tmp_path), seq_len=0)
    assert np.concatenate([corpus.train, corpus.validation]).tobytes() == (
        b"first \nsecond \nthird"
    )


def test_any_text_file_is_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("naïve " * 100, encoding="utf-8")
    corpus = load_corpus(str(path), seq_len=8)
    assert np.concatenate([corpus.train, corpus.validation]).tobytes() == path.read_bytes()
    assert len(corpus.validation) == 35
    assert corpus.vocab_size == 256


@pytest.mark.parametrize(("highest", "vocab_size"), [(255, 256), (256, 257), (65535, 65536)])
def test_a_bin_file_is_uint16_and_widens_the_vocabulary(
    tmp_path: Path, highest: int, vocab_size: int
) -> None:
    path = tmp_path / "tokens.bin"
    tokens = np.arange(1000, dtype="<u2") % 200
    tokens[37] = highest
    tokens.tofile(path)
    corpus = load_corpus(str(path), seq_len=16)
    assert corpus.vocab_size == vocab_size
    assert np.array_equal(np.concatenate([corpus.train, corpus.validation]), tokens)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b"", "is empty"),
        ("empty.bin", b"", "is empty"),
        ("odd.bin", b"abc", "3 bytes"),
        ("short.txt", b"a" * 100, "100 tokens"),
        ("folder/binary", b"\0" * 100, "no text files"),
    ],
)
def test_what_is_no_data_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = str(path if path.parent == tmp_path else path.parent)
    with pytest.raises(ValueError, match=complaint) as raised:
        load_corpus(source, seq_len=64)
    assert source in str(raised.value)


def test_missing_data_raises_with_its_path(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError) as raised:
        load_corpus(missing, seq_len=64)
    assert raised.value.filename == missing


def test_windows_hold_each_tokens_successor() -> None:
    tokens = np.arange(200, dtype=np.uint8)
    for inputs, successors in (
        split_rows(random_rows(tokens, 16, 5, seed=(0, 0, 0))),
        evenly_spaced(tokens, 16, 5, part=0, num_parts=1),
    ):
        assert inputs.shape == successors.shape == (5, 16)
        assert inputs.dtype == torch.int64
        assert torch.equal(inputs + 1, successors)


def test_windows_depend_on_seed_step_and_rank_only() -> None:
    tokens = np.random.default_rng(0).integers(256, size=10_000, dtype=np.uint8)
    first = split_rows(random_rows(tokens, 32, 8, seed=(0, 0, 0)))[0]
    assert torch.equal(first, split_rows(random_rows(tokens, 32, 8, seed=(0, 0, 0)))[0])
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(first, split_rows(random_rows(tokens, 32, 8, seed=other))[0])


def test_random_windows_reach_both_ends() -> None:
    tokens = np.arange(10, dtype=np.uint8)
    inputs, successors = split_rows(random_rows(tokens, 8, 100, seed=(0,)))
    assert inputs.min() == 0
    assert successors.max() == 9


def test_validation_windows_are_shared_out_among_ranks() -> None:
    tokens = np.arange(100, dtype=np.uint8)
    whole = evenly_spaced(tokens, 9, 8, part=0, num_parts=1)[0]
    parts = [evenly_spaced(tokens, 9, 4, part=part, num_parts=2)[0] for part in range(2)]
    assert sorted(whole.tolist()) == sorted(torch.cat(parts).tolist())
    assert whole[0, 0] == 0
    assert whole[-1, -1] == 98
