"""`offload tokens train-predictor` and `tune-thresholds` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload.cli import main
from offload.tokens.predictor_file import load_predictors
from perfmodel.plan_file import Plan

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def test_it_trains_reports_recall_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA))
    Path("text").write_text("now and then " * 60)
    flags = ["--seq-len=64", "--block-tokens=8", "--steps=4", "--data=text", "-o", "out"]
    assert main(["tokens", "train-predictor", "config.json", *flags]) == 0
    said = capsys.readouterr()
    assert "step 4 of 4: loss" in said.err
    assert "1 " in said.out
    assert "tokens.sparse.predictor" in said.out
    found, told = load_predictors("out", channels=32, heads=4, block_tokens=8)
    assert list(found) == [1]
    assert 0 <= told.recalls["1"] <= 1
    assert (told.model, told.data, told.steps, told.causal) == ("config.json", "text", 4, True)


def test_thresholds_are_tuned_and_their_plan_is_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA))
    Path("text").write_text("".join(f"now {n} and then {n * n} " for n in range(60)))
    flags = ["--seq-len=128", "--block-tokens=8", "--data=text", "-o", "plan.json"]
    assert main(["tokens", "tune-thresholds", "config.json", *flags]) == 0
    said = capsys.readouterr().out
    assert "loss with all tokens: 5." in said
    assert said.count("of tokens kept") == 2
    plan = Plan.from_mapping(json.loads(Path("plan.json").read_text()))
    assert plan.tokens.sparse is not None
    assert [each > 0 for each in plan.tokens.sparse.thresholds or ()] == [False, True, False]
    assert main(["tokens", "tune-thresholds", "config.json", *flags[:3], "-o", "no/plan"]) == 2
    assert "no: cannot be written to" in capsys.readouterr().err
    Path("folder").mkdir()
    assert main(["tokens", "tune-thresholds", "config.json", *flags[:3], "-o", "folder"]) == 2
    assert not Path("folder.part").exists()
    with pytest.raises(SystemExit):
        main(["tokens", "tune-thresholds", "config.json", *flags, "--cost=0"])
    assert "0 is not a number over 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": "none.json"}, "none.json: No such file"),
        ({"--data": "none"}, "none: No such file"),
        ({"--seq-len": "4096"}, "two sequences are needed"),
        ({"--block-tokens": "9"}, "not a power of two"),
        ({"--ratio": "0"}, "leaves nothing"),
        ({"-o": "nowhere/out"}, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    change: dict[str, str],
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA))
    Path("text").write_text("now and then " * 60)
    given = {"model": "config.json", "--data": "text", "--seq-len": "64", "-o": "out", **change}
    flags = [word for key, value in given.items() if key != "model" for word in (key, value)]
    assert main(["tokens", "train-predictor", given["model"], *flags]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1
