"""`finetune_long_context.py`: the losses of no savings, an ordinary adapter, misuse in a line."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.examples.conftest import EXAMPLES, ROOT

pytest.importorskip("peft")
load_file = pytest.importorskip("safetensors.torch").load_file

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(spill_dir: Path) -> Run:
    """Runs the example where `config.json` and `spill` are."""
    (spill_dir / "config.json").write_text(json.dumps(LLAMA))
    (spill_dir / "spill").mkdir()

    def start(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(EXAMPLES / "finetune_long_context.py"), *flags],
            cwd=spill_dir,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return start


def loss_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"loss (\d+\.\d+) after 3 steps", done.stdout)
    assert found, done.stdout
    return found[1]


def guides_commands() -> list[str]:
    """Return what the guide has one type: a config, a run in exact mode, in sparse, in gradient."""
    text = (ROOT / "docs" / "tokens.md").read_text()
    found = re.findall(r"^```sh\n(.*?)^```", text, flags=re.M | re.S)
    assert len(found) == 4
    return found


def test_the_guides_config_is_offloaded_and_trains_sparsely(run: Run, spill_dir: Path) -> None:
    config, exact, sparse, gradient = guides_commands()
    subprocess.run(config, shell=True, cwd=spill_dir, check=True)
    done = run(*shlex.split(exact)[2:])
    assert re.search(r"; [1-9][0-9]* MiB were offloaded", done.stdout), done.stdout + done.stderr
    done = run(*shlex.split(sparse)[2:])
    assert "gradient cosine" in done.stdout + done.stderr, done.stderr
    assert "of tokens kept, recall" in done.stdout + done.stderr
    done = run(*shlex.split(gradient)[2:], "--meter-steps=3")
    loss_of(done)
    assert "(+0.00%), gradient cosine" in done.stdout + done.stderr, done.stderr


def test_the_guides_command_trains_as_no_savings_do(run: Run, spill_dir: Path) -> None:
    python, script, *words = shlex.split(guides_commands()[1])
    assert python == ".venv/bin/python"
    assert script == "examples/finetune_long_context.py"
    words.append("--lr=1e-2")
    ours = run(*words, "--save=adapter")
    off = [each for each in words if each not in ("--offload", "ssd", "--offload-path", "spill")]
    whole = run(*off, "--tokens=off", "--save=whole")
    assert loss_of(ours) == loss_of(whole)
    one, other = (
        load_file(spill_dir / name / "adapter_model.safetensors") for name in ("adapter", "whole")
    )
    assert all((one[key] - each).abs().max() < 1e-4 for key, each in other.items())
    assert any(each.abs().max() > 1e-3 for name, each in other.items() if "lora_B" in name)
    assert "MiB were offloaded" in ours.stdout
    assert not list((spill_dir / "spill").iterdir())
    again = run(*words, "--checkpointing")
    assert loss_of(again) == loss_of(whole)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model=absent.json"], "absent.json"),
        (["--model=config.json", "--data=absent.txt"], "absent.txt"),
        (["--model=config.json", "--data=config.json"], "--seq-len is more"),
        (["--model=config.json", "--tokens=exakt"], "did you mean exact"),
        (["--model=config.json", "--keep=0.4"], "--keep is about what --tokens sparse leaves out"),
        (["--model=config.json", "--tokens=sparse", "--keep=0"], "is not over 0 and at most 1"),
        (["--model=config.json", "--tokens=sparse", "--seq-len=128"], "take more than 128"),
        (["--model=config.json", "--offload=ssd", "--offload-path=/dev/shm"], "is in RAM"),
        (["--model=config.json", "--save=absent/adapter"], "--save absent/adapter"),
        (["--model=config.json", "--seq-len=4096"], "the model has 2048 positions"),
    ],
)
def test_misuse_is_said_in_a_line(
    flags: list[str],
    named: str,
    spill_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(spill_dir)
    (spill_dir / "config.json").write_text(json.dumps(LLAMA))
    main = importlib.import_module("finetune_long_context").main
    with pytest.raises(SystemExit) as end:
        main(["--steps=1", *flags])
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()
    [line] = [each for each in said if "finetune_long_context.py: error" in each]
    assert named in line
