"""The benchmarks of leaving tokens out: their text, and what their claims are made of."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

from benchmarks import sparse_context, sparse_quality
from benchmarks.long_context import Measured
from benchmarks.needle_text import DIGITS, code, prose, sample_of
from benchmarks.record import ROOT
from benchmarks.sparse_quality import Judged, Seed


@pytest.mark.parametrize("questions", [1, 3])
def test_every_answer_was_said_before_and_the_last_is_at_the_end(questions: int) -> None:
    text = prose().encode()
    for seed in range(20):
        sample = sample_of(text, 512, questions, random.Random(seed))
        assert len(sample.ids) == 512
        assert len(sample.answers) == questions
        said = bytes(sample.ids.tolist())
        for at in sample.answers:
            sentence = said[said.rindex(b"The number of ", 0, at) : at + DIGITS]
            assert said.index(sentence) < at - len(sentence)
            assert sentence[-DIGITS:].isdigit()
        assert max(sample.answers) == 512 - DIGITS - 2


def test_both_texts_are_long_and_not_the_same() -> None:
    assert min(len(code()), len(prose())) > 400_000
    assert code()[:1000] != prose()[:1000]


def test_times_and_memory_are_claims_of_each_length() -> None:
    def ways(dense_s: float, peak_bytes: float) -> dict[str, Measured]:
        return {
            "checkpointing": Measured([dense_s] * 6, [5.0] * 6, 100.0),
            "sparse": Measured([1.0] * 6, [5.1] * 6, peak_bytes),
        }

    found = {8192: ways(1.2, 100.0), 16384: ways(1.3, 101.0)}
    found[8192]["plain"] = Measured([0.9] * 6, [5.0] * 6, 200.0)
    met = {claim.name: claim.met for claim in sparse_context.make_record(found, {}).claims}
    assert met == {
        "8192: time, checkpointing / sparse": True,
        "8192: memory, checkpointing / sparse": True,
        "8192: memory, plain / sparse": True,
        "16384: time, checkpointing / sparse": False,
        "16384: memory, checkpointing / sparse": False,
    }


def test_quality_is_judged_against_what_dense_training_gained() -> None:
    first = Judged(perplexity=4.0, found=0.1)
    good = Seed(judged={"dense": Judged(3.0, 0.9), "sparse": Judged(3.02, 0.89)})
    bad = Seed(judged={"dense": Judged(3.9, 0.5), "sparse": Judged(4.1, 0.4)})
    claims = sparse_quality.claims_of(first, [good, bad])
    assert [claim.met for claim in claims] == [True] * 5 + [False] * 5


def test_a_tiny_run_writes_a_record(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "sparse_quality.py")]
    command += ["--hidden", "64", "--layers", "3", "--first-steps", "2", "--first-len", "384"]
    command += ["--first-batch", "1", "--steps", "4", "--seq-len", "512", "--seeds", "1"]
    command += ["--judged", "2", "--threads", "1", "--text-bytes", "40000"]
    out = tmp_path / "record.json"
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["met"] is False
    assert len(found["claims"]) == 5
    assert len(found["samples"]["0"]["losses"]["sparse"]) == 4
    assert len(found["samples"]["0"]["cosines"]) == 4
