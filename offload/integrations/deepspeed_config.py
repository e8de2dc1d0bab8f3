"""A DeepSpeed config with the section `offload`: the plan in it, and what is set or refused beside.

Nothing here imports DeepSpeed.
"""

from __future__ import annotations

import base64
import copy
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.config import Plan
from perfmodel.plan import require_known
from perfmodel.plan_file import VERSION

__all__ = [
    "SECTION",
    "DeepSpeedConfig",
    "optimizer_settings",
    "read_config",
    "require_compatible",
    "require_for_deepspeed",
    "split",
]

SECTION = "offload"
_DEPRECATED = {"cpu_offload", "cpu_offload_use_pin_memory"}
_DEFAULT_LR = 1e-3
_ADAMW = ("lr", "betas", "eps", "weight_decay")
# Of DeepSpeed's own AdamW: how it is built, and what ours always does.
_HOW = {
    "torch_adam": (True, False),
    "adam_w_mode": (True,),
    "bias_correction": (True,),
    "amsgrad": (False,),
    "fp32_optimizer_states": (True,),
    "adamw_mode": (True,),
}


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A config as DeepSpeed is to have it, and the plan that stood in it."""

    plan: Plan
    stock: dict[str, Any]
    """With the section, which DeepSpeed keeps and does not read."""
    changes: tuple[str, ...]
    """What was set or taken out, each in words."""
    optimizer: Mapping[str, Any] | None
    """Settings of AdamW; None where the plan leaves the optimizer alone."""


def read_config(config: Any) -> dict[str, Any] | None:
    """Return a copy of a config given as a mapping, a file, or base64, as DeepSpeed reads it.

    None where it is nothing of these, which DeepSpeed says better itself. Raises ValueError for a
    file that is neither JSON nor (where `hjson` is installed) Hjson, or has a key twice, OSError
    for one that cannot be read.
    """
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    if config is None:
        return None
    if os.path.isfile(config):
        try:
            found = _parsed(Path(config).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config}: is not JSON: {error}") from None
    else:
        try:
            found = _parsed(base64.urlsafe_b64decode(config).decode("utf-8"))
        except (TypeError, ValueError):
            return None
    return found if isinstance(found, dict) else None


def _parsed(text: str) -> Any:
    """Parse as DeepSpeed does: Hjson, which has comments, or JSON without that package."""
    try:
        parser = importlib.import_module("hjson")
    except ImportError:
        parser = json
    return parser.loads(text, object_pairs_hook=_without_twins)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = sorted({key for key, _ in pairs if [each for each, _ in pairs].count(key) > 1})
        raise ValueError(f"{', '.join(twice)} is there twice")
    return found


def split(config: Mapping[str, Any], *, has_client: bool) -> DeepSpeedConfig:
    """Return what DeepSpeed is given and what is ours, of a config with the section.

    `has_client`: an optimizer is handed to `initialize`. Raises ValueError naming the key that is
    wrong, or what cannot work together and what to remove.
    """
    section = config[SECTION]
    if not isinstance(section, Mapping):
        raise ValueError(
            f"{SECTION}={section!r} of the DeepSpeed config is no object with a plan's sections: "
            'give {"activations": {"mode": "ssd", "path": ["spill"]}} say, or leave the key out'
        )
    try:
        plan = Plan.from_mapping({"version": VERSION, **section})
    except ValueError as error:
        raise ValueError(f"{SECTION} of the DeepSpeed config: {error}") from None
    stock = copy.deepcopy(dict(config))
    changes = require_for_deepspeed(stock, plan)
    if plan.optimizer is None:
        return DeepSpeedConfig(plan, stock, (), None)
    if has_client:
        raise ValueError(
            f"{SECTION}.optimizer and an optimizer handed to initialize() are two: give its "
            "settings in the config's optimizer section, its groups as model_parameters, and a "
            "scheduler as a function of the optimizer"
        )
    settings = optimizer_settings(stock.pop("optimizer", None))
    return DeepSpeedConfig(plan, stock, changes, settings)


def require_for_deepspeed(config: dict[str, Any], plan: Plan) -> tuple[str, ...]:
    """Set in `config` what the plan's optimizer needs; return the changes in words.

    Raises ValueError for what cannot work beside the plan, with what to remove.
    """
    require_compatible(config, plan)
    if plan.optimizer is None:
        return ()
    changes = []
    zero = config.get("zero_optimization") or {}
    for key, value in (
        ("zero_allow_untested_optimizer", True),
        ("zero_force_ds_cpu_optimizer", False),
    ):
        if zero.get("stage") and config.get(key) is not value:
            config[key] = value
            changes.append(f"{key} = {json.dumps(value)}")
    # DeepSpeed's fp32 parameters leave its device only so.
    leaves = set(plan.optimizer.shares) != {"device"}
    if zero.get("stage") and leaves and not _device(zero):
        for key in sorted(_DEPRECATED & zero.keys()):  # which do not go with the one in their place
            changes.append(f"zero_optimization.{key} is left out")
            del zero[key]
        zero["offload_optimizer"] = {**(zero.get("offload_optimizer") or {}), "device": "cpu"}
        changes.append('zero_optimization.offload_optimizer.device = "cpu"')
    return tuple(changes)


def optimizer_settings(section: Any) -> dict[str, Any]:
    """Return what AdamW is made with, of a config's optimizer section.

    Raises ValueError where it is another optimizer, or has none.
    """
    if not isinstance(section, Mapping) or "type" not in section:
        raise ValueError(
            f"{SECTION}.optimizer needs what to train with: "
            '"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}'
        )
    kind, given = section["type"], section.get("params") or {}
    adam_w = given.get("adam_w_mode", True)
    if str(kind).lower() not in ("adam", "adamw") or not adam_w:
        said = f"adam_w_mode={adam_w}" if not adam_w else f"type={kind!r}"
        raise ValueError(
            f"optimizer.{said} is not AdamW, which is all that {SECTION}.optimizer trains with; "
            f"take one of the two sections out"
        )
    require_known("optimizer.params", given, [*_ADAMW, *_HOW])
    for key, allowed in _HOW.items():
        if key in given and given[key] not in allowed:
            raise ValueError(f"optimizer.params.{key}={given[key]!r} is not offered; leave it out")
    # DeepSpeed's own AdamW decays nothing that it is not told to; torch's does. The rate is both's.
    decay = 1e-2 if given.get("torch_adam") else 0.0
    return {"lr": _DEFAULT_LR, "weight_decay": decay} | {
        key: given[key] for key in _ADAMW if key in given
    }


def _device(zero: Mapping[str, Any]) -> str:
    offload = zero.get("offload_optimizer") or {}
    device = str(offload.get("device") or "none")
    return "" if device == "none" else device


def require_compatible(config: Mapping[str, Any], plan: Plan) -> None:
    """Raise ValueError for what cannot work beside the plan, with what to remove."""
    zero = config.get("zero_optimization") or {}
    compiled = config.get("compile") or {}
    problems = []
    if plan.tokens.mode != "off" and zero.get("stage") == 3:
        problems.append(
            f"zero_optimization.stage=3 shares the head over ranks, and {SECTION}.tokens needs it "
            "whole: take stage 2, or leave the section tokens out"
        )
    if plan.activations.mode == "recompute" or plan.activations.recompute:
        problems.append(
            f"{SECTION}.activations runs layers again, which DeepSpeed cannot be told: switch on "
            "the model's own checkpointing, and leave mode and recompute out"
        )
    if plan.activations.offload is not None and compiled.get("deepcompile"):
        problems.append(
            f"compile.deepcompile rewrites the backward, and {SECTION}.activations is not asked: "
            "remove one"
        )
    if plan.optimizer is not None:
        problems += _against_optimizer(config, zero, compiled, plan)
        if plan.optimizer.early_gradients:
            problems.append(
                f"{SECTION}.optimizer.early_gradients takes gradients that DeepSpeed adds up "
                "itself: remove it"
            )
    if problems:
        raise ValueError("; ".join(problems))


def _against_optimizer(
    config: Mapping[str, Any],
    zero: Mapping[str, Any],
    compiled: Mapping[str, Any],
    plan: Plan,
) -> list[str]:
    """Return what does not go with states that are ours."""
    offload = zero.get("offload_optimizer") or {}
    found = []
    if _device(zero) == "nvme":
        found.append(
            f"zero_optimization.offload_optimizer.device='nvme' and {SECTION}.optimizer both move "
            "states: remove the first, and name its directory as "
            f"{SECTION}.optimizer.path"
        )
    if offload.get("ratio", 1.0) != 1.0:
        found.append(
            f"zero_optimization.offload_optimizer.ratio={offload['ratio']} takes DeepSpeedCPUAdam "
            f"alone: remove it; {SECTION}.optimizer.update_schedule says what the GPU updates"
        )
    shares = plan.optimizer.shares if plan.optimizer is not None else {}
    if zero.get("stage") and "device" in shares and len(shares) > 1:
        found.append(
            f"{SECTION}.optimizer.placement has shares on the device and elsewhere, and ZeRO has "
            "all fp32 parameters on the device or none: give one of them"
        )
    for key, where in (("super_offload", offload), ("zenflow", zero)):
        if where.get(key):
            parent = (
                "zero_optimization.offload_optimizer" if where is offload else "zero_optimization"
            )
            found.append(f"{parent}.{key} has an optimizer of its own: remove it")
    if zero.get("elastic_checkpoint"):
        found.append(
            "zero_optimization.elastic_checkpoint saves states from where they are not: remove it"
        )
    if compiled.get("deepcompile") and compiled.get("offload_opt_states"):
        found.append(
            f"compile.offload_opt_states and {SECTION}.optimizer both move states: remove the first"
        )
    return found
