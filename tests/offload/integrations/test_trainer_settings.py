"""What a Trainer is told that does not go with a plan."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offload.config import Plan
from offload.integrations.trainer_settings import require_arguments, require_one_runs_states


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activation_offloading": True}, "activation_offloading=True and the plan both move"),
        ({"n_gpu": 2}, "2 GPUs of one process"),
    ],
)
def test_other_ways_for_activations_are_refused(
    settings: dict[str, Any], words: str, spill_dir: Path
) -> None:
    moved = {"mode": "ssd", "path": [str(spill_dir)]}
    args = SimpleNamespace(**{"n_gpu": 1, **settings})
    with pytest.raises(ValueError, match=words):
        require_arguments(Plan.from_mapping({"version": 1, "activations": moved}), args)
    require_arguments(Plan.from_mapping({"version": 1}), args)


def test_a_loss_in_segments_is_refused_where_the_head_is_shared() -> None:
    plan = Plan.from_mapping({"version": 1, "tokens": {"mode": "exact"}})
    for settings, words in (
        ({"fsdp": "full_shard"}, "fsdp='full_shard'"),
        ({"n_gpu": 2}, "2 GPUs"),
    ):
        with pytest.raises(ValueError, match=words):
            require_arguments(plan, SimpleNamespace(**{"n_gpu": 1, **settings}))


def test_states_beside_others_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "optimizer.safetensors"
    file.touch()
    require_one_runs_states(file)
    (tmp_path / "optimizer.bin").touch()
    with pytest.raises(ValueError, match=r"optimizer.bin beside it"):
        require_one_runs_states(file)
