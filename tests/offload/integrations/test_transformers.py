"""The Trainer by a plan: the same bits as without, and nothing that is silently not done."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("trainer_run.py")
MODELS = ("llama", "gpt2", "t5")

Ran = dict[str, Any]
"""What the cases came to, by name."""
Start = Callable[..., Ran]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`start(cases)` trains all cases in a process of their own."""

    def run(cases: dict[str, Any], **environment: str) -> Ran:
        place = tmp_path_factory.mktemp("trainer")
        (place / "cases.json").write_text(json.dumps(cases))
        command = [sys.executable, str(PROGRAM), str(place / "cases.json"), str(place / "out.json")]
        everything = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        done = subprocess.run(
            command, env=everything, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found: Ran = json.loads((place / "out.json").read_text())
        return found

    return run


def plan_of(directory: Path, *, states: bool = True) -> dict[str, Any]:
    """Return a plan with activations on the SSD, and states as well."""
    path = [str(directory)]
    found: dict[str, Any] = {
        "version": 1,
        "activations": {"mode": "ssd", "path": path, "min_tensor_bytes": 1024},
    }
    if states:
        found["optimizer"] = {"placement": "ssd", "path": path, "subgroup_params": 5000}
    return found


def same(found: Ran, one: str, other: str) -> None:
    """Fail unless two cases ended in the same losses, norms and parameters."""
    for name in (one, other):
        assert "error" not in found[name], found[name]["trace"]
    assert found[one]["losses"] == found[other]["losses"], (one, other)
    assert found[one]["parameters"] == found[other]["parameters"], (one, other)


def test_losses_and_parameters_have_the_bits_of_no_offload(start: Start, spill_dir: Path) -> None:
    pytest.importorskip("peft")
    cases: dict[str, Any] = {}
    for model, lora in itertools.product(MODELS, (False, True)):
        case = {"model": model, "lora": lora, "arguments": {"gradient_accumulation_steps": 2}}
        cases[f"kept {model} {lora}"] = {**case, "ours": True}
        cases[f"moved {model} {lora}"] = {**case, "plan": plan_of(spill_dir)}
        activations = plan_of(spill_dir, states=False)
        cases[f"callback {model} {lora}"] = {
            **case,
            "ours": True,
            "callback": True,
            "plan": activations,
        }
    found = start(cases)
    for model, lora in itertools.product(MODELS, (False, True)):
        for way in ("moved", "callback"):
            same(found, f"{way} {model} {lora}", f"kept {model} {lora}")
            assert found[f"{way} {model} {lora}"]["logs"]["offloaded_bytes"] > 0


def test_with_deepspeed_the_bits_are_the_same(start: Start, spill_dir: Path) -> None:
    pytest.importorskip("deepspeed")
    cases: dict[str, Any] = {}
    for stage in (2, 3):
        # On the host in both: DeepSpeed adds the norm up in another order there.
        zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
        config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero}
        config["gradient_clipping"] = 1.0  # type: ignore[assignment]
        kept = plan_of(spill_dir) | {"activations": {"mode": "keep"}}
        kept["optimizer"] = {"placement": "device"}
        case = {"model": "llama", "deepspeed": config}
        cases[f"kept {stage}"] = {**case, "plan": kept}
        cases[f"moved {stage}"] = {**case, "plan": plan_of(spill_dir)}
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29611", "RANK": "0", "WORLD_SIZE": "1"}
    found = start(cases, DS_ACCELERATOR="cpu", LOCAL_RANK="0", **place)
    for stage in (2, 3):
        same(found, f"moved {stage}", f"kept {stage}")
        assert found[f"moved {stage}"]["logs"]["offloaded_bytes"] > 0
        assert found[f"moved {stage}"]["optimizer"] == "DeferredAdamW"
        assert found[f"kept {stage}"]["deepspeed"]
        assert found[f"moved {stage}"]["deepspeed"]


def test_trls_sft_trainer_has_the_bits_of_no_offload(start: Start, spill_dir: Path) -> None:
    pytest.importorskip("trl")
    kept = plan_of(spill_dir) | {"activations": {"mode": "keep"}}
    kept["optimizer"] = {"placement": "device"}
    case = {"model": "llama", "sft": True, "arguments": {"gradient_accumulation_steps": 2}}
    found = start({"kept": case | {"plan": kept}, "moved": case | {"plan": plan_of(spill_dir)}})
    same(found, "moved", "kept")
    assert found["moved"]["logs"]["offloaded_bytes"] > 0


def test_a_checkpoint_is_gone_on_from_with_the_same_bits(
    start: Start, spill_dir: Path, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    case = {"model": "llama", "plan": plan_of(spill_dir)}
    stock = {"model": "llama", "arguments": saving, "directory": str(tmp_path / "stock")}
    found = start(
        {
            "whole": {**case, "arguments": saving, "directory": str(tmp_path / "ours")},
            "resumed": {**case, "resume": str(tmp_path / "ours" / "checkpoint-2")},
            "stock": stock,
            "from stock": {**case, "resume": str(tmp_path / "stock" / "checkpoint-2")},
            "without": {
                **case,
                "plan": plan_of(spill_dir, states=False),
                "resume": str(tmp_path / "ours" / "checkpoint-2"),
            },
        }
    )
    assert "this plan has none, so that they would be lost" in found["without"]["error"]
    assert "checkpoint-2/optimizer.safetensors" in found["whole"]["files"]
    assert "error" not in found["resumed"], found["resumed"]["trace"]
    assert found["resumed"]["parameters"] == found["whole"]["parameters"]
    assert "error" not in found["from stock"], found["from stock"]["trace"]
    gone_on, whole = (
        [loss for loss, _ in found[name]["losses"]][-2:] for name in ("from stock", "stock")
    )
    assert gone_on == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plan": {"version": 1, "activations": {"mode": "recompute"}}}, "gradient_checkpointing"),
        ({"arguments": {"optim": "adafactor"}}, "optim='adafactor' is not AdamW"),
        ({"arguments": {"optim": "adamw_torch_4bit"}}, "optim='adamw_torch_4bit' is not AdamW"),
        ({"callback": True}, "the Trainer's is AdamW"),
        ({"plan": {"version": 1, "optimiser": {}}}, "did you mean 'optimizer'"),
    ],
)
def test_what_cannot_be_done_is_refused(
    start: Start, spill_dir: Path, change: dict[str, Any], words: str
) -> None:
    [found] = start({"case": {"model": "gpt2", "plan": plan_of(spill_dir), **change}}).values()
    assert words in found["error"]
