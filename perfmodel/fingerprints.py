"""For what a plan was made: a hash of it, a line for people, and what says where others differ."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from perfmodel.machine import Machine
from perfmodel.units import format_bytes
from perfmodel.workload import Workload

__all__ = ["MadeFor"]

# What says nothing of speed, or changes from one day to the next.
_NAMES_OF_MACHINES = ("name", "source", "not_measured")
_CHANGING_OF_DRIVES = ("free_bytes", "path")
_MOST_DIFFERENCES = 4
_NOT_THERE = "nothing"


@dataclass(frozen=True, kw_only=True)
class MadeFor:
    """A workload or a machine. Raises ValueError for a fingerprint that is not that of `of`."""

    fingerprint: str
    """SHA-256 of what counts of it, as JSON with sorted keys and no spaces."""
    description: str = ""
    """For people."""
    of: Mapping[str, Any] | None = None
    """What was hashed; null: it is not kept."""

    def __post_init__(self) -> None:
        """Check that it is a hash, and of what."""
        is_hash = isinstance(self.fingerprint, str) and re.fullmatch(
            "[0-9a-f]{64}", self.fingerprint
        )
        if not is_hash:
            raise ValueError(f"fingerprint={self.fingerprint!r} is not a SHA-256 in hexadecimal")
        if not isinstance(self.description, str):
            raise ValueError(f"description={self.description!r} is no text")
        if self.of is not None and not isinstance(self.of, Mapping):
            raise ValueError(f"of={self.of!r} is not an object with keys, nor null")
        if self.of is not None and _hash(self.of) != self.fingerprint:
            raise ValueError(
                f"fingerprint={self.fingerprint[:12]}… is not that of `of` beside it; one of them "
                "was changed"
            )

    @classmethod
    def workload(cls, workload: Workload) -> MadeFor:
        """Return the mark of a workload; what a model is called does not count."""
        of = json.loads(_canonical(workload.to_json()))
        del of["model"]["name"]
        return cls(fingerprint=_hash(of), description=_workload_line(workload), of=of)

    @classmethod
    def machine(cls, machine: Machine) -> MadeFor:
        """Return the mark of a machine; names, sources and free space do not count."""
        of = machine.to_json()
        for key in _NAMES_OF_MACHINES:
            del of[key]
        for key in _CHANGING_OF_DRIVES if of["drive"] is not None else ():
            del of["drive"][key]
        return cls(fingerprint=_hash(of), description=_machine_line(machine))

    def require(self, other: MadeFor) -> None:
        """Raise ValueError that says what differs, unless `other` is the same."""
        if self.fingerprint == other.fingerprint:
            return
        differing = list(_differences(self.of or {}, other.of or {})) if self.of else []
        said = "; ".join(differing[:_MOST_DIFFERENCES])
        more = len(differing) - _MOST_DIFFERENCES
        said += f"; and {more} more" if more > 0 else ""
        raise ValueError(
            f"the plan was made for {self.description or 'another workload'}, not for "
            f"{other.description}{f': {said}' if said else ''}"
        )


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _hash(values: Mapping[str, Any]) -> str:
    try:
        return hashlib.sha256(_canonical(values).encode()).hexdigest()
    except (TypeError, ValueError):
        raise ValueError(f"of={values!r} is not JSON") from None


def _differences(
    one: Mapping[str, Any], other: Mapping[str, Any], where: str = ""
) -> Iterator[str]:
    for key in sorted({*one, *other}):
        mine, its = one.get(key, _NOT_THERE), other.get(key, _NOT_THERE)
        if isinstance(mine, Mapping) and isinstance(its, Mapping):
            yield from _differences(mine, its, f"{where}{key}.")
        elif mine != its:
            yield f"{where}{key} is {mine} in the plan and {its} here"


def _workload_line(workload: Workload) -> str:
    model, parallel = workload.model, workload.parallel
    layers = model.num_layers + model.encoder_layers
    shared = [
        f"{key} {getattr(parallel, key)}"
        for key in ("data", "tensor", "pipeline", "chunks", "context", "zero_stage")
        if getattr(parallel, key) > (key != "zero_stage")
    ]
    described = ", ".join(shared)
    ranks = f"{parallel.ranks} rank{'s' if parallel.ranks > 1 else ''}"
    return (
        f"{model.name or 'a model'} ({layers} layers, hidden {model.hidden_size}), "
        f"{workload.accumulation} x {workload.micro_batch} x {workload.seq_len} tokens, "
        f"{workload.dtype}, {ranks}{f' ({described})' if shared else ''}, "
        f"{workload.framework}"
    )


def _machine_line(machine: Machine) -> str:
    device, drive = machine.device, machine.drive
    parts = [
        f"{machine.name}: {machine.devices} x {device.name}, {format_bytes(device.memory_bytes)}",
        f"host {format_bytes(machine.host.memory_bytes)}",
    ]
    if drive is not None:
        parts.append(f"SSD {drive.write_bytes_per_s / 1e9:.3g} GB/s written")
    return ", ".join(parts)
