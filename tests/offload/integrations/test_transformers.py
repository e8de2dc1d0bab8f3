"""The Trainer by a plan: the same bits as without, and nothing that is silently not done."""

from __future__ import annotations

import itertools
import json
import os
import socket
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
Start = Callable[..., Any]
EXACT = {
    "version": 1,
    "tokens": {"mode": "exact", "loss_segment_tokens": 10, "mlp_tile_tokens": 24},
}


def one_rank() -> dict[str, str]:
    """Return what a launcher would say to one, with a port that nobody has: tests run together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return where | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`start(cases)` trains all cases in a process of their own; with `ranks` in so many."""

    def run(cases: dict[str, Any], ranks: int = 0, **environment: str) -> Any:
        place = tmp_path_factory.mktemp("trainer")
        (place / "cases.json").write_text(json.dumps(cases))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *(torchrun if ranks else []), str(PROGRAM)]
        command += [str(place / "cases.json"), str(place / "out.json")]
        everything = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        done = subprocess.run(
            command, env=everything, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        names = [f"out.json.{rank}" for rank in range(ranks)] or ["out.json"]
        found = [json.loads((place / name).read_text()) for name in names]
        return found if ranks else found[0]

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
    states = {"version": 1, "optimizer": plan_of(spill_dir)["optimizer"]}
    found = start(cases | {"states": {"model": "gpt2", "plan": states}})
    for model, lora in itertools.product(MODELS, (False, True)):
        for way in ("moved", "callback"):
            same(found, f"{way} {model} {lora}", f"kept {model} {lora}")
            assert found[f"{way} {model} {lora}"]["logs"]["offloaded_bytes"] > 0
    assert found["states"]["logs"]["ssd_write_bytes"] > 0
    assert found["states"]["logs"]["optimizer_bytes"] > 0


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
    found = start(cases, **one_rank())
    for stage in (2, 3):
        same(found, f"moved {stage}", f"kept {stage}")
        assert found[f"moved {stage}"]["logs"]["offloaded_bytes"] > 0
        assert found[f"moved {stage}"]["optimizer"] == "DeferredAdamW"
        assert found[f"kept {stage}"]["deepspeed"]
        assert found[f"moved {stage}"]["deepspeed"]


def test_what_cannot_be_done_with_deepspeed_is_refused(start: Start, spill_dir: Path) -> None:
    pytest.importorskip("deepspeed")
    elsewhere = "hand it to the Trainer as plan="
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"offload": {"activations": {"mode": "keep"}}}, elsewhere),
        ({"callback": True}, {"offload": {}}, elsewhere),
        ({}, {"compile": {"deepcompile": True}}, "compile.deepcompile"),
        ({"ours": True}, {}, "give the plan a section optimizer"),
    ]
    cases = {}
    for number, (change, config, _) in enumerate(refused):
        section = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}
        plan = plan_of(spill_dir, states=False)
        case = {"model": "gpt2", "plan": plan, "deepspeed": section | config}
        cases[str(number)] = {**case, **change}
    found = start(cases, **one_rank())
    for number, (_, _, words) in enumerate(refused):
        assert words in found[str(number)].get("error", ""), words


def test_a_loss_in_segments_trains_alike(start: Start, spill_dir: Path) -> None:
    moved = plan_of(spill_dir) | EXACT
    kept = EXACT | {"optimizer": {"placement": "device"}}
    found = start(
        {
            "whole": {"model": "llama", "ours": True},
            "kept": {"model": "llama", "plan": kept},
            "moved": {"model": "llama", "plan": moved},
            "by autocast": {"model": "llama", "plan": kept, "arguments": {"bf16": True}},
        }
    )
    same(found, "moved", "kept")
    assert "error" not in found["by autocast"], found["by autocast"]["trace"]
    whole, kept_losses = ([loss for loss, _ in found[way]["losses"]] for way in ("whole", "kept"))
    assert kept_losses == pytest.approx(whole, rel=1e-4)


def test_trls_sft_trainer_has_the_bits_of_no_offload(start: Start, spill_dir: Path) -> None:
    pytest.importorskip("trl")
    kept = plan_of(spill_dir) | {"activations": {"mode": "keep"}}
    kept["optimizer"] = {"placement": "device"}
    case = {"model": "llama", "sft": True, "arguments": {"gradient_accumulation_steps": 2}}
    exact = kept | {"tokens": EXACT["tokens"]}  # beside TRL's own head, which stays
    plans = {"kept": kept, "moved": plan_of(spill_dir), "exact": exact}
    found = start({name: case | {"plan": plan} for name, plan in plans.items()})
    same(found, "moved", "kept")
    assert "error" not in found["exact"], found["exact"]["trace"]
    losses = [[loss for loss, _ in found[name]["losses"]] for name in ("kept", "exact")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
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
            # Ours over what a stock run has left in a folder, and a stock run over that.
            "over stock": {**case, "arguments": saving, "directory": str(tmp_path / "stock")},
            "of ours": {**case, "resume": str(tmp_path / "stock" / "checkpoint-2")},
            "stock over it": stock,
            "of both": {**case, "resume": str(tmp_path / "stock" / "checkpoint-2")},
        }
    )
    assert "checkpoint-2/optimizer.pt" in found["stock"]["files"]
    assert "checkpoint-2/optimizer.pt" not in found["over stock"]["files"]
    assert "error" not in found["of ours"], found["of ours"]["trace"]
    assert "optimizer.pt beside it are states of two runs" in found["of both"]["error"]
    assert "this plan has none, so that they would be lost" in found["without"]["error"]
    assert "checkpoint-2/optimizer.safetensors" in found["whole"]["files"]
    assert "error" not in found["resumed"], found["resumed"]["trace"]
    assert found["resumed"]["parameters"] == found["whole"]["parameters"]
    assert "error" not in found["from stock"], found["from stock"]["trace"]
    gone_on, whole = (
        [loss for loss, _ in found[name]["losses"]][-2:] for name in ("from stock", "stock")
    )
    assert gone_on == pytest.approx(whole, rel=1e-5)


def test_with_deepspeed_a_checkpoint_is_gone_on_from_with_the_same_bits(
    start: Start, spill_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero}
    case = {"model": "llama", "plan": plan_of(spill_dir), "deepspeed": config}
    saving = {"save_strategy": "steps", "save_steps": 2}
    found = start(
        {
            "whole": {**case, "arguments": saving, "directory": str(tmp_path / "out")},
            "resumed": {**case, "resume": str(tmp_path / "out" / "checkpoint-2")},
        },
        **one_rank(),
    )
    assert "error" not in found["whole"], found["whole"]["trace"]
    assert "error" not in found["resumed"], found["resumed"]["trace"]
    assert found["resumed"]["parameters"] == found["whole"]["parameters"]


def sparse_plan(**rule: Any) -> dict[str, Any]:
    """Return a plan that leaves tokens out of the second of two layers."""
    given = {"block_tokens": 4, "pool_tokens": 2, "ratios": [1.0, 0.3], **rule}
    return {"version": 1, "tokens": {"mode": "sparse", "sparse": given}}


def test_quality_is_logged_every_so_often_and_a_fallback_lasts_in_checkpoints(
    start: Start, tmp_path: Path
) -> None:
    never = {"most_loss_gap": 1e6, "least_gradient_cosine": -1.0}
    at_once = {"most_loss_gap": 0.0, "meter_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": 2}
    folders = [tmp_path / "fallen", tmp_path / "sparse"]
    resumed = {"model": "llama", "plan": sparse_plan()}
    twice = {"arguments": {"gradient_accumulation_steps": 2}, "model": "llama"}
    fallen = {"model": "llama", "arguments": saving, "directory": str(folders[0])}
    found = start(
        {
            "measured": {**twice, "plan": sparse_plan(**never, meter_steps=2)},
            "unmeasured": {**twice, "plan": sparse_plan()},
            "fallen": {**fallen, "plan": sparse_plan(**at_once)},
            "resumed": {**resumed, "resume": str(folders[0] / "checkpoint-2")},
            "over it": {**fallen, "plan": sparse_plan()},
            "resumed over it": {**resumed, "resume": str(folders[0] / "checkpoint-2")},
        }
    )
    same(found, "measured", "unmeasured")
    assert [each["step"] for each in found["measured"]["quality"]] == [0, 2]
    for each in found["measured"]["quality"]:
        assert each["sparse_loss"] != each["dense_loss"]
        assert 0.2 < each["kept_share_1"] < 0.6
        assert 0 < each["recall_1"] == each["recall"] <= 1
        assert "kept_share_0" not in each, "all are always kept there"
    assert found["unmeasured"]["quality"] == []
    assert len(found["fallen"]["quality"]) == 1, "what is dense is not asked how far from dense"
    assert found["fallen"]["logs"]["kept_share"] == found["resumed"]["logs"]["kept_share"] == 1
    assert found["resumed"]["parameters"] == found["fallen"]["parameters"]
    assert "checkpoint-2/all_tokens.json" in found["fallen"]["files"]
    assert "checkpoint-2/all_tokens.json" not in found["over it"]["files"]
    assert found["resumed over it"]["logs"]["kept_share"] < 0.8


def test_a_directory_that_one_rank_lacks_stops_all(start: Start, spill_dir: Path) -> None:
    cases = {}
    for section in ("activations", "optimizer"):
        plan = plan_of(spill_dir)
        plan[section]["path"] = [str(spill_dir), str(spill_dir / "absent")]
        cases[section] = {"model": "gpt2", "plan": plan, "path of rank": section}
    for rank, found in enumerate(start(cases, ranks=2)):
        for section in cases:
            assert "absent" in found[section]["error"], section
            assert rank or "rank 1 cannot apply its plan" in found[section]["error"], section


def test_what_cannot_be_done_is_refused(start: Start, spill_dir: Path) -> None:
    again = {"version": 1, "activations": {"mode": "recompute"}}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"arguments": {"label_smoothing_factor": 0.1}, "plan": EXACT}, "label_smoothing_factor"),
        ({"cls": True}, "optimizer_cls_and_kwargs"),
        ({"plan": again}, "gradient_checkpointing"),
        ({"arguments": {"optim": "adafactor"}}, "optim='adafactor' is not AdamW"),
        ({"arguments": {"optim": "adamw_torch_4bit"}}, "optim='adamw_torch_4bit' is not AdamW"),
        ({"callback": True}, "the Trainer's is AdamW"),
        (
            {"callback": True, "plan": sparse_plan(meter_steps=5)},
            "tokens.sparse.meter_steps=5: a callback takes no forwards of its own",
        ),
        ({"plan": {"version": 1, "optimiser": {}}}, "did you mean 'optimizer'"),
    ]
    case = {"model": "gpt2", "plan": plan_of(spill_dir)}
    found = start({words: {**case, **change} for change, words in refused})
    for words, came in found.items():
        assert words in came.get("error", ""), words
