"""Tests of `perfmodel simulate`: what Megatron has no schedule for is refused in a line."""

from __future__ import annotations

import json

import pytest

from perfmodel.cli import main

CLUSTER = [
    *("simulate", "--model", "llama-2-7b", "--machine", "ssdtrain", "--seq-len", "2048"),
    *("--micro-batch", "1"),
]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--pipeline", "5", "--global-batch", "5"], "do not divide num_layers=32"),
        (["--pipeline", "4", "--chunks", "2", "--global-batch", "6"], "not a multiple of"),
    ],
)
def test_parts_that_no_schedule_has_are_refused(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CLUSTER, *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert named in line


def test_moving_activations_is_a_row_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--pipeline", "4", "--global-batch", "8", "--json"]
    steps = {}
    for way in ("keep", "ssd"):
        assert main([*CLUSTER, *flags, "--activations", way]) == 0
        [steps[way]] = (row["pipeline"] for row in json.loads(capsys.readouterr().out))
    assert max(steps["keep"]["written_bytes"]) == 0
    assert max(steps["ssd"]["device_bytes"]) < max(steps["keep"]["device_bytes"])
    assert main([*CLUSTER, *flags[:-1], "--activations", "ssd"]) == 0
    assert "as far as the SSDs keep up" in capsys.readouterr().out
    assert main([*CLUSTER, *flags]) == 0
    assert json.loads(capsys.readouterr().out)[0]["pipeline"] is None
