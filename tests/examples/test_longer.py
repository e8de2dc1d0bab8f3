"""`--tokens`: what is left out is the same in every mode, and evaluation leaves nothing out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Main = Callable[..., int]
FLAGS = ("--seq-len=512", "--layers=4", "--hidden=32", "--steps=2", "--micro-batch=1")


@pytest.fixture
def losses_of(main: Main, tmp_path: Path) -> Callable[..., list[float]]:
    """Trains with the given flags and returns the losses."""

    def run(*flags: str) -> list[float]:
        file = tmp_path / "summary.json"
        assert main(*FLAGS, *flags, f"--summary={file}") == 0
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        losses: list[float] = summary["losses"]
        return losses

    return run


@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_what_is_left_out_is_the_same_however_layers_run(
    model: str, losses_of: Callable[..., list[float]], spill_dir: Path
) -> None:
    sparse = (f"--model={model}", "--tokens=sparse", "--keep=0.3")
    losses = losses_of(*sparse, "--offload=none")
    assert losses_of(*sparse, "--offload=recompute") == losses
    ssd = ("--offload=ssd", f"--offload-path={spill_dir}", "--min-tensor-bytes=4096")
    assert losses_of(*sparse, *ssd) == losses
    exact = losses_of(f"--model={model}", "--tokens=exact", "--offload=none")
    assert losses[0] != exact[0]
    assert losses[0] == pytest.approx(exact[0], rel=0.02)
    gradient = losses_of(f"--model={model}", "--tokens=gradient", "--offload=recompute")
    assert gradient[0] == exact[0]
    assert gradient[1] != exact[1]


def test_in_half_precision_tokens_are_left_out_as_well(
    losses_of: Callable[..., list[float]],
) -> None:
    half = ("--dtype=bf16", "--offload=none")
    losses = losses_of("--tokens=sparse", *half)
    assert losses_of("--tokens=exact", *half)[0] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize(("tokens", "offload"), [("sparse", "recompute"), ("gradient", "none")])
def test_the_meter_says_how_far_it_is_from_dense_and_changes_no_loss(
    tokens: str,
    offload: str,
    losses_of: Callable[..., list[float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = (f"--tokens={tokens}", f"--offload={offload}", "--keep=0.3", "--dtype=bf16")
    losses = losses_of(*flags, "--grad-accum=2")
    said = capsys.readouterr()
    assert "gradient cosine" not in said.out
    assert re.search(r"kept=[4-9][0-9]%", said.err)
    assert losses_of(*flags, "--grad-accum=2", "--meter-steps=1") == losses
    said = capsys.readouterr()
    found = re.findall(r"step (\d): loss .* cosine 0\.\d+, \d+% of tokens kept", said.out)
    assert found == ["0", "1"]


def test_a_model_too_shallow_to_leave_tokens_out_says_so(
    main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--seq-len=512", "--layers=2", "--tokens=sparse", "--offload=none") == 0
    assert "warning: no attention of 2 leaves tokens out" in capsys.readouterr().err
