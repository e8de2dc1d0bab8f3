"""Whatever brings the data, a step trains on the same windows."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from examples.data import random_rows, split_rows

Main = Callable[..., int]


@pytest.fixture
def loaders(train_gpt: ModuleType) -> Any:
    return importlib.import_module("loaders")


def order(loaders: Any, dtype: str) -> Any:
    tokens = np.arange(5000, dtype=dtype) % 251
    return loaders.Order(tokens, seq_len=32, micro_batch=3, grad_accum=2, seed=5, rank=1)


@pytest.mark.parametrize("dtype", ["uint8", "<u2"])
def test_windows_depend_on_seed_rank_step_and_micro_batch_only(loaders: Any, dtype: str) -> None:
    wanted = order(loaders, dtype)
    batches = loaders.open_loader("torch", wanted, torch.device("cpu"))
    for step in range(3):
        for micro in range(2):
            tokens, successors = next(batches)
            rows = random_rows(wanted.tokens, 32, 3, (5, 1, step, micro))
            assert torch.equal(tokens, split_rows(rows)[0])
            assert torch.equal(successors, split_rows(rows)[1])


@pytest.mark.parametrize("dtype", ["uint8", "<u2"])
def test_dali_brings_the_same_windows(loaders: Any, dtype: str) -> None:
    pytest.importorskip("nvidia.dali")
    ours, theirs = (
        loaders.open_loader(name, order(loaders, dtype), torch.device("cpu"))
        for name in ("torch", "dali")
    )
    for _ in range(12):
        for mine, other in zip(next(ours), next(theirs), strict=True):
            assert other.dtype == torch.int64
            assert torch.equal(mine, other)


def test_dali_trains_to_the_same_bits(main: Main, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    losses = []
    for loader in ("torch", "dali"):
        summary = tmp_path / f"{loader}.json"
        assert main("--loader", loader, "--offload=none", "--summary", summary) == 0
        losses.append(json.loads(summary.read_text())["losses"])
    assert losses[0] == losses[1]


def test_a_missing_package_is_one_line_that_says_how_to_get_it(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert main("--loader=dali", "--offload=none") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install nvidia-dali-cuda130" in said
