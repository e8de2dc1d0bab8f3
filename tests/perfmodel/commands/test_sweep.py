"""A sweep has a row for each value, and obeys what restricts a search."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.perfmodel.said import SMALL, said


def test_a_sweep_has_a_row_for_each_length_and_draws_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "chart.svg"
    words = ["plan", "--model", "llama-2-7b", "--machine", "h100-sxm", "--micro-batch", "1"]
    words += ["--sweep", "seq-len=1024:4096", "-o", str(path)]
    lines = said(capsys, *words).splitlines()
    rows = [line.split()[0] for line in lines if line.endswith(("]", ">"))]
    assert rows == ["1024", "2048", "4096"]
    texts = {each.text for each in ElementTree.parse(path).iter() if each.tag.endswith("text")}
    assert {*rows, "seq-len"} <= texts
    found = json.loads(said(capsys, *words, "--json"))
    assert [each["seq_len"] for each in found] == [1024, 2048, 4096]


def test_a_sweep_of_batches_splits_none_and_obeys_what_restricts_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", *SMALL, "--machine", "rtx-4090", "--seq-len", "256", "--global-batch", "8"]
    words += ["--sweep", "micro-batch=1:4", "--activations", "keep", "--json"]
    best = [each["best"] for each in json.loads(said(capsys, *words))]
    pairs = [(each["micro_batch"], each["accumulation"]) for each in best]
    assert pairs == [(1, 8), (2, 4), (4, 2)]
    assert {each["strategy"]["activations"] for each in best} == {"keep"}
