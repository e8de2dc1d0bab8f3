"""A DeepSpeed config of today with its offloading said as ours, and what is different then."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.integrations.deepspeed_config import SECTION, split

__all__ = ["Migration", "migrated"]

_BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Migration:
    """A new config, and what was done to the old one, a line each."""

    config: dict[str, Any]
    lines: tuple[str, ...]


def migrated(config: Mapping[str, Any], path: str = "") -> Migration:
    """Return `config` with a section `offload` in the place of its own offloading of states.

    `path`: where activations go; none: they stay. States go to where DeepSpeed had them, on the
    host or in the same directory. Parameters (`offload_param`) stay
    DeepSpeed's. Raises ValueError for a config that has the section, or none of what it replaces.
    """
    if SECTION in config:
        raise ValueError(f"the config has a section {SECTION!r} already")
    work = _Work(copy.deepcopy(dict(config)), path)
    work.states()
    work.activations()
    if not work.section:
        raise ValueError(
            "the config offloads neither states nor activations, and no --path says where to: "
            "there is nothing to do"
        )
    work.config[SECTION] = work.section
    split(work.config, has_client="optimizer" not in work.section)  # raises for what is wrong
    return Migration(work.config, tuple(work.lines))


class _Work:
    def __init__(self, config: dict[str, Any], path: str) -> None:
        self.config, self._path = config, path
        self.section: dict[str, Any] = {}
        self.lines: list[str] = []
        self._zero: dict[str, Any] = config.get("zero_optimization") or {}

    def states(self) -> None:
        """Say where optimizer states go."""
        offload = self._zero.pop("offload_optimizer", None) or {}
        device = str(offload.get("device") or "none")
        if self._zero.pop("zenflow", None):
            self.lines.append(
                "zenflow: removed; it updates parts of the model later than others, which is "
                "another algorithm: here every parameter is updated at every step"
            )
            device = "cpu" if device == "none" else device
        if device == "none":
            return
        if offload.get("super_offload"):
            self.lines.append(
                "super_offload: removed; states are updated on the host, in the step and not in a "
                "process beside it"
            )
        self.section["optimizer"] = self._placed(offload, device)
        if "pin_memory" in offload:  # of the fp32 parameters, which stay on the host
            self._zero["offload_optimizer"] = {
                "device": "cpu",
                "pin_memory": offload["pin_memory"],
            }

    def _placed(self, offload: Mapping[str, Any], device: str) -> dict[str, Any]:
        was = f"offload_optimizer.device = {device!r}"
        if device == "nvme":
            if not offload.get("nvme_path"):
                raise ValueError("offload_optimizer.device='nvme' has no nvme_path: name it")
            found: dict[str, Any] = {"placement": "ssd", "path": [str(offload.get("nvme_path"))]}
            self.lines.append(
                f"{was}: placement 'ssd' in the same directory; every block is checked by its "
                "CRC32C, a full drive is an error and not lost bytes, and nothing is left behind"
            )
            found |= self._requests()
            return found
        ratio = float(offload.get("ratio", 1.0))
        if ratio < 1:
            self.lines.append(
                f"offload_optimizer.ratio = {ratio:g}: removed; all states lie on the host, and "
                "update_schedule 'auto' has the GPU update as much of them as pays"
            )
        self.lines.append(f"{was}: placement 'host'")
        return {"placement": "host"}

    def _requests(self) -> dict[str, Any]:
        """Return what of the section `aio` says something here as well."""
        aio = self.config.get("aio") or {}
        found = {}
        if "queue_depth" in aio:
            found["queue_depth"] = int(aio["queue_depth"])
        block = int(aio.get("block_size", 0))
        if block and block % _BLOCK_BYTES == 0:
            found["block_bytes"] = block
        param = (self._zero.get("offload_param") or {}).get("device")
        if self.config.get("aio") and param != "nvme":
            del self.config["aio"]
            self.lines.append(f"aio: removed; {json.dumps(found)} stand in {SECTION}.optimizer")
        return found

    def activations(self) -> None:
        """Say where activations go."""
        checkpointing = self.config.get("activation_checkpointing") or {}
        if checkpointing.get("cpu_checkpointing"):
            self.lines.append(
                "activation_checkpointing.cpu_checkpointing: kept; what deepspeed.checkpointing "
                "keeps is no saved tensor of autograd's, and stays DeepSpeed's to move"
            )
        if self._path:
            self.section["activations"] = {"mode": "ssd", "path": [self._path]}
            self.lines.append(f"activations: to {Path(self._path)}, where there is time for it")
        if (self._zero.get("offload_param") or {}).get("device") in ("cpu", "nvme"):
            self.lines.append("offload_param: kept; parameters stay DeepSpeed's to move")
