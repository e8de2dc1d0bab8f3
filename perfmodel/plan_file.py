"""The plan as a file: what a run is to do, for what it was made, and what was predicted of it.

One JSON of version 1. It is what `perfmodel plan -o` writes, and what stands under the top-level
key `offload` of a DeepSpeed config.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from perfmodel.fingerprints import MadeFor
from perfmodel.machine import Machine
from perfmodel.plan import (
    ActivationsConfig,
    OptimizerConfig,
    nearest,
    require_bytes,
    require_choice,
    require_known,
    require_number,
    require_whole,
)
from perfmodel.token_plan import TokensSection
from perfmodel.workload import Strategy, Workload

__all__ = [
    "MODES",
    "VERSION",
    "ActivationsSection",
    "Limits",
    "Plan",
    "Predicted",
    "read_plan",
]

VERSION = 1
MODES = ("keep", "recompute", "host", "ssd", "auto")
_MOST = 1 << 60
_SECONDS_OF_A_YEAR = 3.2e7


@dataclass(frozen=True, kw_only=True)
class ActivationsSection:
    """What becomes of saved activations. Raises ValueError naming the key and what is allowed.

    In JSON the keys of `offload` stand beside `mode` and `recompute`.
    """

    mode: str = "keep"
    """`keep`; `recompute`; `host` or `ssd`, the tier that they go to; `auto`: to `tier`, or run
    again, as its speed allows. In JSON without it: the tier's."""
    recompute: tuple[int, ...] | None = None
    """Numbers of the blocks that are run again, from 0; None: all with `recompute`, with `auto`
    those that a search finds, else none."""
    offload: ActivationsConfig | None = None

    def __post_init__(self) -> None:
        """Check the values, also against each other."""
        require_choice("mode", self.mode, MODES)
        if self.recompute is not None:
            object.__setattr__(self, "recompute", _block_numbers(self.recompute))
        if self.mode == "keep" and self.recompute:
            raise ValueError(f"recompute={self.recompute!r} does not go with mode='keep'")
        if (self.offload is None) != (self.mode in ("keep", "recompute")):
            what = "needs a tier" if self.offload is None else "has no tier, nor its settings"
            raise ValueError(f"mode={self.mode!r} {what}")
        tiers = ("host", "ssd") if self.mode == "auto" else (self.mode,)
        if self.offload is not None and self.offload.tier not in tiers:
            raise ValueError(f"mode={self.mode!r} does not go with tier={self.offload.tier!r}")

    @classmethod
    def from_mapping(cls, section: Mapping[str, Any]) -> ActivationsSection:
        """Make it from JSON; without a `mode` it is the tier's. Unknown keys raise ValueError."""
        own = ("mode", "recompute")
        rest = {key: value for key, value in section.items() if key not in own}
        require_known("activations", rest, [*own, *(one.name for one in fields(ActivationsConfig))])
        mode = section.get("mode")
        if mode is None:
            offload = ActivationsConfig.from_mapping(rest)
            mode = offload.tier
        elif mode in ("keep", "recompute"):
            if rest:
                raise ValueError(f"mode={mode!r} has no tier, nor its settings such as {min(rest)}")
            offload = None
        else:
            require_choice("mode", mode, MODES)
            tier = "host" if mode == "host" else "ssd"
            offload = ActivationsConfig.from_mapping({"tier": tier, **rest})
        return cls(mode=mode, recompute=section.get("recompute"), offload=offload)

    def to_json(self) -> dict[str, Any] | None:
        """Return what `from_mapping` makes this of again; None: everything is kept."""
        if self == ActivationsSection():
            return None
        offload = asdict(self.offload) if self.offload is not None else {}
        return {"mode": self.mode, "recompute": self.recompute, **offload}


def _block_numbers(value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"recompute={value!r} is not a list of blocks' numbers")
    for number in value:
        require_whole("recompute", number, 0, 1 << 20)
    if len(set(value)) < len(value):
        raise ValueError(f"recompute={value!r} names a block twice")
    return tuple(sorted(value))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may take, of each rank but for the SSD; None: as much as there is."""

    device_bytes: int | None = None
    """Of the memory of the device that computes."""
    host_bytes: int | None = None
    """Of the host's memory, pinned included."""
    pinned_bytes: int | None = None
    """Of pinned memory."""
    ssd_bytes: int | None = None
    """On each drive, of all ranks that share it."""
    ssd_write_bytes_per_day: int | None = None
    """The most to be written to each drive in any 24 hours, by all ranks that share it."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        for one in fields(self):
            if getattr(self, one.name) is not None:
                require_bytes(one.name, getattr(self, one.name))


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What the planner expects of a step: of each rank, once nothing is new any more."""

    step_s: float
    """A step, its update included."""
    peak_device_bytes: int
    """Everything on the device at the worst moment."""
    peak_host_bytes: int
    """Of the host's memory, at the worst moment."""
    ssd_bytes: int
    """On the SSD at the worst moment."""
    ssd_write_bytes: int
    """Written to the SSD in a step."""
    tokens_per_s: float
    """Of all ranks."""

    def __post_init__(self) -> None:
        """Check the figures."""
        require_number("step_s", self.step_s, 0, _SECONDS_OF_A_YEAR)
        require_number("tokens_per_s", self.tokens_per_s, 0, _MOST)
        for key in ("peak_device_bytes", "peak_host_bytes", "ssd_bytes", "ssd_write_bytes"):
            require_bytes(key, getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is to do. Raises ValueError in one line, naming section, key and value."""

    activations: ActivationsSection = field(default_factory=ActivationsSection)
    """What becomes of saved activations; null: all are kept."""
    optimizer: OptimizerConfig | None = None
    """Where the states of `offload.AdamW` lie; null: torch's own optimizer, with the parameters."""
    tokens: TokensSection = field(default_factory=TokensSection)
    """What becomes of tokens that a long context has too many of."""
    limits: Limits = field(default_factory=Limits)
    """What the run may take."""
    report: str | None = None
    """The file for what is measured; null: none."""
    micro_batch: int | None = None
    """Sequences of a forward, of each rank; null: as the run is given."""
    accumulation: int | None = None
    """Forwards of a step; null: as the run is given."""
    workload: MadeFor | None = None
    """What it was made for; null: any."""
    machine: MadeFor | None = None
    """Whose speeds it was made with."""
    predicted: Predicted | None = None
    """What was expected of it."""

    def __post_init__(self) -> None:
        """Check what no section checks."""
        if self.report is not None and not (isinstance(self.report, str) and self.report):
            raise ValueError(f"report={self.report!r} is not a file's name")
        for key in ("micro_batch", "accumulation"):
            value = getattr(self, key)
            if value is None:
                continue
            require_whole(key, value, 1, 1 << 30)
            made = (self.workload.of or {}).get(key, value) if self.workload else value
            if made != value:
                raise ValueError(f"{key}={value} is not the {made} of its workload")

    @classmethod
    def of(
        cls,
        workload: Workload,
        strategy: Strategy,
        *,
        machine: Machine | None = None,
        path: tuple[str, ...] = (),
        limits: Limits | None = None,
        report: str | None = None,
        predicted: Predicted | None = None,
    ) -> Plan:
        """Return the plan of a strategy. Raises ValueError where an SSD has no `path`."""
        mode = strategy.activations
        offload = None
        if mode in ("host", "ssd"):
            offload = ActivationsConfig(
                tier=mode,
                path=path if mode == "ssd" else (),
                memory_bytes=strategy.memory_bytes,
                staging_bytes=strategy.staging_bytes,
                min_tensor_bytes=strategy.min_tensor_bytes,
            )
        optimizer = None
        if strategy.optimizer == "offload":
            optimizer = OptimizerConfig(
                placement=strategy.placement,
                path=path if "ssd" in strategy.shares else (),
                update_schedule=strategy.update_schedule,
                early_gradients=strategy.early_gradients,
                subgroup_params=strategy.subgroup_params,
            )
        return cls(
            activations=ActivationsSection(
                mode=mode, recompute=strategy.recompute, offload=offload
            ),
            optimizer=optimizer,
            limits=limits or Limits(),
            report=report,
            micro_batch=workload.micro_batch,
            accumulation=workload.accumulation,
            workload=MadeFor.workload(workload),
            machine=MadeFor.machine(machine) if machine is not None else None,
            predicted=predicted,
        )

    @classmethod
    def from_mapping(cls, data: Any) -> Plan:
        """Make the plan from JSON. ValueError: an unknown key, a wrong version, type or value."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a plan is an object with keys, not {data!r}")
        version = data.get("version")
        if version != VERSION or isinstance(version, bool):
            said = (
                f"version={version!r} is not known" if "version" in data else "version is missing"
            )
            raise ValueError(f"{said}; this release reads version {VERSION}")
        if "offload" in data:
            raise ValueError("plan.offload is how a DeepSpeed config has it: give what is under it")
        require_known("plan", data, ["version", *(one.name for one in fields(cls))])
        found = {key: value for key, value in data.items() if key != "version"}
        for key, kind in SECTIONS.items():
            if found.get(key) is not None:
                found[key] = _section(kind, found[key], key)
            else:  # null is what a plan has without the section
                found.pop(key, None)
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_mapping` makes this of again, of lists, dicts, numbers and strings."""
        found: dict[str, Any] = {"version": VERSION}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, ActivationsSection):
                value = value.to_json()
            elif is_dataclass(value) and not isinstance(value, type):
                value = asdict(value)
            found[one.name] = _plain(value)
        return found

    def check_workload(self, workload: Workload) -> None:
        """Raise ValueError that says what differs, unless the plan is for `workload`, or for any.

        The model's name does not count.
        """
        if self.workload is not None:
            self.workload.require(MadeFor.workload(workload))

    def is_for_machine(self, machine: Machine) -> bool:
        """Say whether it was made with this machine's speeds. Names and free space do not count."""
        return self.machine is not None and (
            self.machine.fingerprint == MadeFor.machine(machine).fingerprint
        )


SECTIONS: dict[str, Any] = {
    "activations": ActivationsSection,
    "optimizer": OptimizerConfig,
    "tokens": TokensSection,
    "limits": Limits,
    "workload": MadeFor,
    "machine": MadeFor,
    "predicted": Predicted,
}


def _section(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is an object with keys, or null, not {value!r}")
    try:
        if hasattr(kind, "from_mapping"):
            return kind.from_mapping(value)
        require_known(name, value, [one.name for one in fields(kind)])
        for one in fields(kind):
            needed = one.default is MISSING and one.default_factory is MISSING
            if needed and one.name not in value:
                raise ValueError(f"{one.name} is missing{nearest(one.name, list(value))}")
        return kind(**value)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(f"{name}.") else f"{name}: {said}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def read_plan(path: str | Path) -> Plan:
    """Return the plan of a file. Raises ValueError naming it and what is wrong, and OSError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return Plan.from_mapping(json.loads(text))
    except FileNotFoundError:
        said = "No such plan; `perfmodel plan ... -o FILE` writes one"
        raise FileNotFoundError(errno.ENOENT, said, str(path)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
