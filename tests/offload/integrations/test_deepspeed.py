"""DeepSpeed with a section `offload`: the same bits as stock, wherever activations and states lie.

All cases of a number of ranks run in one start of them, which takes as long as a hundred cases.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.offload.integrations.deepspeed_cases import ADAMW, Start, config_of, with_offload

pytest.importorskip("deepspeed")

MATRIX = [*itertools.product((0, 1, 2, 3), ("fp32", "bf16"), (1, 3), (0.0, 0.05))]


def name_of(case: tuple[Any, ...], what: str) -> str:
    """Return what a case is called."""
    return f"{what}: zero {case[0]}, {case[1]}, {case[2]} x, clip {case[3]:g}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_parameters_have_the_bits_of_no_offload(
    start: Start, spill_dir: Path, ranks: int
) -> None:
    cases: dict[str, Any] = {}
    for number, case in enumerate(MATRIX):
        config = config_of(*case)
        if case[0]:  # with which DeepSpeed adds the norm up in another order, for clipping
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        cases[name_of(case, "kept")] = {"config": config, "stock": True, "client": ADAMW}
        placement = ("ssd", "host", "host=0.5,ssd=0.5")[number % 3]
        moved = with_offload(config_of(*case), spill_dir, placement)
        cases[name_of(case, "moved")] = {"config": moved}
    for rank in start(ranks, cases):
        for case in MATRIX:
            kept, moved = rank[name_of(case, "kept")], rank[name_of(case, "moved")]
            assert "error" not in kept, kept["trace"]
            assert "error" not in moved, moved["trace"]
            assert moved["offloaded"] > 0
            assert moved["losses"] == kept["losses"], name_of(case, "losses")
            assert moved["parameters"] == kept["parameters"], name_of(case, "parameters")


def test_groups_schedules_and_checkpointing_change_nothing(start: Start, spill_dir: Path) -> None:
    cases: dict[str, Any] = {}
    for stage, again in itertools.product((0, 1, 2, 3), ("", "torch", "deepspeed")):
        for what, config in (
            ("kept", config_of(stage)),
            ("moved", with_offload(config_of(stage), spill_dir, "ssd")),
        ):
            case = {"config": config, "groups": True, "scheduled": True, "again": again}
            case |= {"stock": True, "client": ADAMW} if what == "kept" else {}
            cases[f"{what} {stage} {again}"] = case
    [found] = start(1, cases)
    for name, moved in found.items():
        if name.startswith("moved"):
            kept = found[name.replace("moved", "kept")]
            assert "error" not in moved, moved["trace"]
            # What DeepSpeed's checkpoints keep is no saved tensor of autograd's.
            assert name.endswith("deepspeed") or moved["offloaded"] > 0, name
            assert moved["losses"] == kept["losses"], name
            assert moved["parameters"] == kept["parameters"], name


def test_stock_torch_adamw_ends_in_nearly_the_same_losses(start: Start, spill_dir: Path) -> None:
    stock = config_of(2) | {"optimizer": {"type": "AdamW", "params": ADAMW | {"torch_adam": True}}}
    cases = {
        "stock": {"config": stock, "stock": True},
        "moved": {"config": with_offload(config_of(2), spill_dir, "ssd")},
    }
    [found] = start(1, cases)
    assert found["moved"]["losses"] == pytest.approx(found["stock"]["losses"], rel=1e-6)


def test_without_the_section_it_is_stock(start: Start) -> None:
    stock = config_of(2) | {"optimizer": {"type": "AdamW", "params": ADAMW | {"torch_adam": True}}}
    [found] = start(1, {"ours": {"config": stock}, "stock": {"config": stock, "stock": True}})
    assert found["ours"] == found["stock"]


def test_a_directory_that_one_rank_lacks_stops_all_with_its_message(
    start: Start, spill_dir: Path
) -> None:
    cases: dict[str, Any] = {}
    for section, stage, dtype in (
        ("activations", 2, "fp32"),
        ("optimizer", 2, "fp32"),
        ("optimizer", 0, "bf16"),  # of which DeepSpeed asks a step while it is made
        ("optimizer", 3, "bf16"),
    ):
        config = with_offload(config_of(stage, dtype), spill_dir, "ssd")
        config["offload"][section]["path"] = [str(spill_dir), str(spill_dir / "absent")]
        case = {"config": config, "fails": True, "directory_of_rank": section}
        cases[f"{section} {stage}"] = case
    found = start(2, cases)
    for name in cases:
        assert found[0][name]["error"].startswith("RuntimeError: rank 1 cannot apply"), name
        assert "absent" in found[0][name]["error"]
        assert "absent" in found[1][name]["error"]


def test_a_meter_that_nobody_would_ask_is_refused(start: Start) -> None:
    config = config_of(1) | {"optimizer": {"type": "AdamW", "params": ADAMW}}
    config["offload"] = {"tokens": {"mode": "sparse", "sparse": {"meter_steps": 5}}}
    [found] = start(1, {"metered": {"config": config}})
    assert "tokens.sparse.meter_steps=5: an engine is not asked" in found["metered"]["error"]


def test_an_optimizer_of_parameters_that_zero_replaces_is_an_error(
    start: Start, spill_dir: Path
) -> None:
    cases: dict[str, Any] = {}
    for stage, dtype in ((0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")):
        config = with_offload(config_of(stage, dtype), spill_dir, "ssd")
        del config["offload"]["optimizer"], config["optimizer"]
        cases[f"{stage}"] = {"config": config, "plain client": True}
    [found] = start(1, cases)
    for stage, case in found.items():
        assert "RuntimeError" in case.get("error", ""), (stage, case)
    assert "offload.integrations.deepspeed.initialize" in found["2"]["error"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_have_the_bits_of_no_offload(start: Start, spill_dir: Path, ranks: int) -> None:
    cases: dict[str, Any] = {}
    for stage in (0, 1, 2):
        config = config_of(stage, "bf16")
        moved = with_offload(config, spill_dir, "ssd")
        cases[f"kept {stage}"] = {"config": config, "stock": True, "client": ADAMW, "experts": True}
        cases[f"moved {stage}"] = {"config": moved, "experts": True}
    for rank in start(ranks, cases):
        for stage in (0, 1, 2):
            same(rank, f"moved {stage}", f"kept {stage}")


def test_a_pipeline_of_two_stages_has_the_bits_of_no_offload(start: Start, spill_dir: Path) -> None:
    cases: dict[str, Any] = {}
    for stage in (0, 1):
        config = config_of(stage, accumulation=4)
        moved = with_offload(config, spill_dir, "ssd")
        cases[f"kept {stage}"] = {
            "config": config,
            "stock": True,
            "client": ADAMW,
            "pipeline": True,
        }
        cases[f"moved {stage}"] = {"config": moved, "pipeline": True}
    for rank in start(2, cases):
        for stage in (0, 1):
            same(rank, f"moved {stage}", f"kept {stage}")
            assert rank[f"moved {stage}"]["offloaded"] > 0


def test_parameters_that_deepspeed_moves_itself_change_nothing(
    start: Start, spill_dir: Path
) -> None:
    cases: dict[str, Any] = {}
    for dtype, to in itertools.product(("fp32", "bf16"), ("cpu",)):
        config = config_of(3, dtype)
        config["zero_optimization"]["offload_param"] = {"device": to}
        kept = {"config": config_of(3, dtype), "stock": True, "client": ADAMW}
        cases[f"kept {dtype}"] = kept
        cases[f"moved {dtype}"] = {"config": with_offload(config, spill_dir, "ssd")}
    [found] = start(1, cases)
    for dtype in ("fp32", "bf16"):
        same(found, f"moved {dtype}", f"kept {dtype}")


def test_a_full_drive_keeps_activations_in_memory_with_the_same_bits(
    start: Start, spill_dir: Path
) -> None:
    section = with_offload(config_of(2), spill_dir, "host")
    cases: dict[str, Any] = {
        "kept": {"config": section},
        "full": {"config": section, "file_bytes": {"0": 4096}},
    }
    [found] = start(1, cases)
    same(found, "full", "kept")
    assert found["full"]["kept in memory"] > 0


def test_states_that_find_no_room_end_their_rank_and_no_other_hangs(
    start: Start, spill_dir: Path
) -> None:
    config = with_offload(config_of(2), spill_dir, "ssd")
    del config["offload"]["activations"]
    full = {"config": config, "file_bytes": {"1": 4096}, "fails": True}
    found = start(2, {"full": full})
    assert found[1]["full"]["error"].startswith("OSError: [Errno 28]")
    assert "the step is half done: load a checkpoint" in found[1]["full"]["error"]
    assert "error" in found[0]["full"]  # whose partner is gone


def same(found: dict[str, Any], one: str, other: str) -> None:
    """Fail unless two cases ended in the same losses and parameters."""
    for name in (one, other):
        assert "error" not in found[name], (name, found[name]["trace"])
    assert found[one]["losses"] == found[other]["losses"], (one, other)
    assert found[one]["parameters"] == found[other]["parameters"], (one, other)
