"""`offload tokens train-predictor` and `tune-thresholds` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload.cli import main
from offload.tokens.predictor_file import load_predictors
from offload.tokens.threshold_tuning import ThresholdTuning
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
    assert "of 1 sequences that were not tuned on: loss with all tokens: 5." in said
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


def test_thresholds_are_judged_by_sequences_that_they_were_not_tuned_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA))
    learnt = "".join(f"now {n} and then {n * n} " for n in range(60))[: 4 * 64]
    said = []
    for last in ("A", "B"):
        Path("text").write_text(learnt + last * 64)
        flags = ["--seq-len=64", "--block-tokens=8", "--data=text", "-o", f"{last}.json"]
        assert main(["tokens", "tune-thresholds", "config.json", *flags]) == 0
        said.append(capsys.readouterr().out.splitlines()[:3])
    assert Path("A.json").read_text() == Path("B.json").read_text()
    assert all(one != other for one, other in zip(*said, strict=True))


def test_a_plan_that_would_leave_nothing_out_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA))
    Path("text").write_text("now and then " * 60)
    monkeypatch.setattr(ThresholdTuning, "tune", lambda *_, **__: (-1.0, 0.0, -1.0))
    flags = ["--seq-len=64", "--block-tokens=8", "--data=text", "-o", "plan.json"]
    assert main(["tokens", "tune-thresholds", "config.json", *flags]) == 2
    assert "no threshold for config.json is over 0" in capsys.readouterr().err
    assert not Path("plan.json").exists()


@pytest.mark.parametrize("command", ["train-predictor", "tune-thresholds"])
@pytest.mark.parametrize("seq_len", [32, 100, 128])
def test_sequences_of_a_first_and_a_last_block_alone_are_refused(
    command: str,
    seq_len: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA))
    Path("text").write_text("now and then " * 60)
    flags = [f"--seq-len={seq_len}", "--data=text", "-o", "out"]
    assert main(["tokens", command, "config.json", *flags]) == 2
    said = capsys.readouterr().err
    assert f"--seq-len {seq_len} has no block between the first and the last" in said
    assert "give more than 128, or a smaller --block-tokens than 64" in said
    assert said.count("\n") == 1
    assert not Path("out").exists()


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
    given = {"model": "config.json", "--data": "text", "--seq-len": "160", "-o": "out", **change}
    flags = [word for key, value in given.items() if key != "model" for word in (key, value)]
    assert main(["tokens", "train-predictor", given["model"], *flags]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1
