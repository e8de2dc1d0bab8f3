"""The benchmarks of leaving tokens out: their text, and what their claims are made of."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

from benchmarks import block_recall, sparse_context, sparse_quality
from benchmarks.block_recall import Asked
from benchmarks.long_context import Measured
from benchmarks.needle_text import NAMES, VALUES, code, prose, repeated, sample_of
from benchmarks.record import ROOT
from benchmarks.sparse_quality import Judged, Seed


@pytest.mark.parametrize("questions", [1, 3])
def test_every_answer_was_said_before_and_the_last_is_at_the_end(questions: int) -> None:
    text = prose().encode("ascii")
    for seed in range(20):
        sample = sample_of(text, 512, questions, random.Random(seed))
        assert len(sample.ids) == 512
        assert len(sample.answers) == questions
        said = bytes(sample.ids.tolist())
        for at in sample.answers:
            name = said[at - 1]
            assert name in NAMES
            assert said[at] in VALUES
            assert said.count(name) == 2
            assert said.index(said[at - 1 : at + 1]) == said.index(name) < at - 2
        assert max(sample.answers) == 512 - 2


@pytest.mark.parametrize("seed", range(8))
def test_a_string_is_said_again_and_again(seed: int) -> None:
    sample = repeated(64, random.Random(seed))
    said = sample.ids.tolist()
    period = min(sample.answers) - 1
    assert 16 <= period < 32
    assert said[period:] == said[: 64 - period]
    assert len(set(said)) > 8
    assert sample.answers == tuple(range(period + 1, 64))


def test_more_facts_than_names_or_than_fit_are_refused() -> None:
    text = b"text " * 1000
    with pytest.raises(ValueError, match="64 names"):
        sample_of(text, 4000, 65, random.Random(0))
    with pytest.raises(ValueError, match="not 128"):
        sample_of(text, 128, 20, random.Random(0))


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


def test_recall_and_its_cost_are_claims_of_each_way() -> None:
    ways = {
        "means of 8": Asked([0.96, 0.98], [0.01] * 8),
        "predictors": Asked([0.96, 0.9], [0.01] * 20 + [0.05]),
    }
    met = [claim.met for claim in block_recall.make_record(ways, {}).claims]
    assert met == [True, True, False, True]


def test_a_tiny_run_writes_a_record(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.sparse_quality"]
    command += ["--hidden", "64", "--layers", "3", "--repeated-steps", "1"]
    command += ["--code-steps", "1", "--long-steps", "1", "--steps", "4"]
    command += [
        "--seq-len",
        "512",
        "--seeds",
        "1",
        "--judged",
        "2",
        "--threads",
        "1",
        "--text-bytes",
        "40000",
    ]
    base, out = str(tmp_path / "base"), tmp_path / "record.json"
    command += ["--base", base, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["met"] is False
    assert len(found["claims"]) == 5
    assert len(found["samples"]["0"]["losses"]["sparse"]) == 4
    assert len(found["samples"]["0"]["cosines"]) == 4
    command = [sys.executable, "-m", "benchmarks.block_recall", "--base", base]
    command += ["--seq-len", "512", "--steps", "2", "--train-len", "384", "--judged", "3"]
    command += ["--threads", "1", "--pools", "8", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert [len(each["recalls"]) for each in found["samples"].values()] == [3, 3]
