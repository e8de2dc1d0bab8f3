"""This machine's description, measured the first time and read from a file after that."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from offload.calibrate.present import calibrate
from offload.device.present import name_of, present_device
from offload.native import inspect_directory
from perfmodel.machine import Machine, read_machine

__all__ = ["CACHE", "present_machine"]

CACHE = Path("~/.cache/offload")
_MOST_DAYS = 30
_FORM = "2"  # of what is measured: what was measured otherwise is of no use
_DAY_S = 86_400


def present_machine(path: str | None = None, *, cache: Path = CACHE) -> Machine:
    """Return this machine with the drive of `path`, measured within the last 30 days or now.

    A minute the first time. What was measured lies in `cache`, by device, torch, threads and
    directory; delete it to measure anew. Raises OSError where `path` or the cache cannot be used.
    """
    file = cache.expanduser() / f"machine-{_mark(path)}.json"
    try:
        if time.time() - file.stat().st_mtime < _MOST_DAYS * _DAY_S:
            return _as_it_is(read_machine(str(file)), path)
    except (FileNotFoundError, ValueError):
        pass  # none, or one that an older release wrote
    machine = calibrate(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps(machine.to_json(), indent=1) + "\n", encoding="utf-8")
    whole.replace(file)  # another rank may do the same
    return machine


def _as_it_is(machine: Machine, path: str | None) -> Machine:
    """Return a machine with what its drive has free now."""
    if machine.drive is None or path is None:
        return machine
    free_bytes = inspect_directory(path).free_bytes
    return replace(machine, drive=replace(machine.drive, free_bytes=free_bytes))


def _mark(path: str | None) -> str:
    device = present_device()
    where = os.path.realpath(path) if path is not None else ""
    said = [_FORM, name_of(device), torch.__version__, str(torch.get_num_threads()), where]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]
