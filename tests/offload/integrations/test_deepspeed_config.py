"""The section `offload` of a DeepSpeed config: what is set beside it, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from offload.cli import main
from offload.integrations.deepspeed_config import read_config, split
from offload.integrations.deepspeed_migration import migrated

STATES = {"placement": "ssd", "path": ["/nvme"]}
MOVED = {"mode": "ssd", "path": ["/nvme"]}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3}}


def config(stage: int = 2, **more: Any) -> dict[str, Any]:
    """Return a config with both sections."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": ADAMW,
        "offload": {"activations": MOVED, "optimizer": STATES},
        **more,
    }


def test_deepspeed_is_told_to_take_another_optimizer_and_to_leave_the_device() -> None:
    given = config()
    found = split(given, has_client=False)
    assert "optimizer" not in found.stock
    assert found.stock["zero_allow_untested_optimizer"] is True
    assert found.stock["zero_force_ds_cpu_optimizer"] is False
    assert found.stock["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert found.stock["offload"] == given["offload"]
    assert len(found.changes) == 3
    assert given == config(), "what was given is as it was"
    assert found.optimizer == {"lr": 1e-3, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("given", "decay"),
    [({}, 0.0), ({"torch_adam": True}, 1e-2), ({"torch_adam": True, "weight_decay": 0.3}, 0.3)],
)
def test_weight_decay_that_is_not_given_is_deepspeeds(given: dict[str, Any], decay: float) -> None:
    params = {"lr": 1e-3, **given}
    found = split(config() | {"optimizer": {"type": "AdamW", "params": params}}, has_client=False)
    assert found.optimizer is not None
    assert found.optimizer["weight_decay"] == decay


@pytest.mark.parametrize("old", [True, False])
def test_the_old_name_of_what_is_set_is_left_out_and_said(old: bool) -> None:
    given = config()
    given["zero_optimization"] |= {"cpu_offload": old, "cpu_offload_use_pin_memory": False}
    found = split(given, has_client=False)
    assert found.stock["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert "zero_optimization.cpu_offload is left out" in found.changes


@pytest.mark.parametrize("section", [{"type": "Adam"}, {"type": "AdamW", "params": {}}])
def test_a_learning_rate_that_is_not_given_is_deepspeeds(section: dict[str, Any]) -> None:
    found = split(config() | {"optimizer": section}, has_client=False)
    assert found.optimizer == {"lr": 1e-3, "weight_decay": 0.0}


def test_what_stays_on_the_device_is_left_there() -> None:
    given = config()
    given["offload"]["optimizer"] = {"placement": "device"}
    assert "offload_optimizer" not in split(given, has_client=False).stock["zero_optimization"]
    assert split(config(stage=0), has_client=False).changes == ()


def test_without_an_optimizer_in_the_section_nothing_is_set() -> None:
    given = config()
    del given["offload"]["optimizer"]
    found = split(given, has_client=True)
    assert found.stock == given
    assert found.optimizer is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offload": {"optimiser": STATES}}, "did you mean 'optimizer'"),
        ({"offload": {"optimizer": STATES | {"paths": "/nvme"}}}, "did you mean 'path'"),
        ({"offload": []}, "offload=[] of the DeepSpeed config"),
        ({"optimizer": {"type": "Lion", "params": {"lr": 1}}}, "type='Lion' is not AdamW"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode=False"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1, "wd": 1}}}, "optimizer.params.wd"),
        ({"optimizer": None}, '"optimizer": {"type": "AdamW"'),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device='nvme' and offload.optimizer both move states",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "ratio=0.5",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "zero_optimization.offload_optimizer.super_offload",
        ),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
        ({"zero_optimization": {"elastic_checkpoint": True}}, "elastic_checkpoint"),
        ({"offload": {"optimizer": {"placement": "host=0.5,device=0.5"}}}, "give one of them"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
        (
            {"offload": {"tokens": {"mode": "exact"}}, "zero_optimization": {"stage": 3}},
            "take stage 2",
        ),
        ({"offload": {"activations": {"mode": "recompute"}}}, "the model's own checkpointing"),
        ({"offload": {"optimizer": STATES | {"early_gradients": True}}}, "early_gradients"),
    ],
)
def test_what_cannot_work_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        split(config() | change, has_client=False)


def test_two_optimizers_are_refused() -> None:
    with pytest.raises(ValueError, match="an optimizer handed to initialize"):
        split(config(), has_client=True)


def test_a_file_is_read_and_what_is_no_file_left_to_deepspeed(tmp_path: Path) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(config()))
    assert read_config(file) == read_config(str(file)) == config()
    assert read_config("eyJhIjogMX0=") == {"a": 1}
    assert read_config("not base64 either " * 100) is None
    file.write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="a is there twice"):
        read_config(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_config(file)


# ---- configs of today ----------------------------------------------------------------------------


def today(offload: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a config that offloads in DeepSpeed's own way."""
    zero = {"stage": 3, "offload_optimizer": offload}
    return {"optimizer": ADAMW, "zero_optimization": zero, **more}


def test_states_on_nvme_stay_in_their_directory() -> None:
    aio = {"queue_depth": 16, "block_size": 1 << 20, "use_gds": False}
    found = migrated(today({"device": "nvme", "nvme_path": "/nvme"}, aio=aio))
    expected = {"placement": "ssd", "path": ["/nvme"], "queue_depth": 16, "block_bytes": 1 << 20}
    assert found.config["offload"] == {"optimizer": expected}
    assert "aio" not in found.config
    assert "offload_optimizer" not in found.config["zero_optimization"]
    assert split(found.config, has_client=False).plan.optimizer is not None


def test_pinned_memory_stays_as_it_was_and_a_missing_directory_is_named() -> None:
    found = migrated(today({"device": "cpu", "pin_memory": False}))
    kept = found.config["zero_optimization"]["offload_optimizer"]
    assert kept == {"device": "cpu", "pin_memory": False}
    with pytest.raises(ValueError, match="has no nvme_path"):
        migrated(today({"device": "nvme"}))


def test_comments_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("hjson")
    file = tmp_path / "ds_config.json"
    file.write_text('{"a": 1,  # of a config\n}')
    assert read_config(file) == {"a": 1}


def test_a_ratio_is_removed_and_parameters_stay_deepspeeds() -> None:
    given = today({"device": "cpu", "ratio": 0.4})
    given["zero_optimization"]["offload_param"] = {"device": "cpu"}
    found = migrated(given, "/nvme")
    assert found.config["offload"]["optimizer"] == {"placement": "host"}
    assert found.config["offload"]["activations"] == {"mode": "ssd", "path": ["/nvme"]}
    assert found.config["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert any("offload_param: kept" in line for line in found.lines)


def test_the_command_writes_the_new_file_and_says_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(today({"device": "nvme", "nvme_path": "/nvme"})))
    assert main(["plan-from-ds", str(old), "-o", str(new)]) == 0
    assert "CRC32C" in capsys.readouterr().out
    assert json.loads(new.read_text())["offload"]["optimizer"]["placement"] == "ssd"
    assert main(["plan-from-ds", str(new)]) == 2
    assert "has a section 'offload' already" in capsys.readouterr().err
    old.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert main(["plan-from-ds", str(old)]) == 2
    assert "there is nothing to do" in capsys.readouterr().err
    assert main(["plan-from-ds", str(tmp_path / "absent.json")]) == 2


def test_a_section_that_is_misspelt_is_asked_about(caplog: pytest.LogCaptureFixture) -> None:
    integration = pytest.importorskip("offload.integrations.deepspeed")
    integration._hint({"train_batch_size": 1, "zero_optimization": {}, "fp16": {}})
    assert not caplog.records
    integration._hint({"offlaod": {}})
    assert "'offlaod', and no section 'offload'" in caplog.text


def test_what_deepspeeds_checkpoints_keep_stays_deepspeeds_to_move() -> None:
    given = config() | {"activation_checkpointing": {"cpu_checkpointing": True}}
    assert split(given, has_client=False).stock["activation_checkpointing"]["cpu_checkpointing"]
    del given["offload"]
    found = migrated(given, path="spill")
    assert found.config["activation_checkpointing"] == {"cpu_checkpointing": True}
    assert any("cpu_checkpointing: kept" in line for line in found.lines)


@pytest.mark.parametrize("section", [None, "plan.json", []])
def test_a_section_that_is_none_is_told_what_one_is(section: Any) -> None:
    with pytest.raises(ValueError, match="is no object with a plan's sections: give"):
        split({"offload": section}, has_client=False)
