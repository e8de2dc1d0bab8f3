"""The machine that this runs on, as the performance model takes it."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from offload.calibrate.beside import measure_held_up
from offload.calibrate.drive import measure_drive
from offload.calibrate.memory import PARAMS, MemoryRounds
from offload.calibrate.operators import COMPUTING, Piece, operator_pieces, seconds_of, tiny
from offload.calibrate.timing import Stopwatch, curve_of
from offload.device import num_devices
from offload.device.cuda_updates import CudaUpdates
from offload.device.present import host_memory_bytes, memory_bytes, name_of, present_device
from offload.native import ThreadPool
from offload.optimizer.calibration import measure_rates
from perfmodel.machine import Curve, Device, Host, Link, Machine

__all__ = ["calibrate"]

_ROUNDS = 3
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32)}
# Tensors of operators, in MiB: what stays in a processor's caches, and what does not.
_OPERATOR_MIB = {"cpu": (1, 8), "cuda": (4, 64)}

Seconds = dict[Piece, list[float]]


def calibrate(
    path: str | None,
    *,
    device: torch.device | None = None,
    rounds: int = _ROUNDS,
    progress: Callable[[float], object] = lambda part: None,
) -> Machine:
    """Measure this machine and, where `path` names a directory, the drive it is on.

    Takes a minute or less, 400 MB of memory and 256 MiB of the drive. Everything is measured in
    each of `rounds`; `progress` is told which part of that is done. What could not be measured is
    named by `Machine.not_measured`. Raises OSError with errno, message and path where `path` cannot
    be written to.
    """
    chosen = device or present_device()
    drive = measure_drive(path, rounds) if path is not None else None
    if drive is not None and path is not None and chosen.type == "cpu":
        held_up = measure_held_up(path, rounds)
        if held_up is not None:
            drive = replace(
                drive, beside_bytes_per_s=held_up.bytes_per_s, beside_s=held_up.tensor_s
            )
    pool = ThreadPool(torch.get_num_threads())
    link, update_params_per_s = _link(chosen, pool)
    watch = Stopwatch(chosen)
    memory = MemoryRounds(watch, pool)
    operators = _operators(watch, memory, rounds, progress, torch_updates=link is None)
    missing = [] if drive else ["drive: no PATH was given"]
    missing += [] if link else ["link: this device's memory is the host's"]
    missing += ["network_bytes_per_s: it takes several ranks"]
    if drive:
        missing.append("drive.rated_bytes: its maker says how much may be written to it (TBW)")
    return Machine(
        name="present",
        source="measured by `offload calibrate`",
        devices=max(1, num_devices()) if chosen.type == "cuda" else 1,
        device=_device(watch, operators, memory, update_params_per_s),
        host=_host(memory),
        link=link,
        drive=drive,
        not_measured=tuple(missing),
    )


def _operators(
    watch: Stopwatch,
    memory: MemoryRounds,
    rounds: int,
    progress: Callable[[float], object],
    *,
    torch_updates: bool,
) -> Seconds:
    """Return the seconds of every piece of work, and have memory's taken in beside it."""
    kind = watch.device.type
    pieces = [
        piece
        for dtype in _DTYPES[kind]
        for piece in operator_pieces(watch.device, dtype, _OPERATOR_MIB[kind])
    ]
    found: Seconds = defaultdict(list)
    for turn in range(rounds):
        memory.measure(torch_updates=torch_updates)
        for at, piece in enumerate(pieces):
            found[piece] += seconds_of(piece, watch)
            progress((turn + (at + 1) / len(pieces)) / rounds)
    return found


def _curves(found: Seconds, dtype: str) -> dict[str, Curve]:
    by_name: dict[str, list[tuple[float, float, Sequence[float]]]] = defaultdict(list)
    for piece, seconds in found.items():
        if piece.dtype == dtype:
            by_name[piece.name].append((piece.size, piece.amount, seconds))
    return {name: curve_of(measured) for name, measured in by_name.items()}


def _device(
    watch: Stopwatch, found: Seconds, memory: MemoryRounds, update_params_per_s: float
) -> Device:
    device = watch.device
    names = [str(dtype).removeprefix("torch.") for dtype in _DTYPES[device.type]]
    curves = {name: _curves(found, name) for name in names}
    matmul = {name: curves[name].pop("linear") for name in names}
    others = {key: curve for key, curve in curves[names[0]].items() if key not in COMPUTING}
    others |= {
        f"{key} {name}": curves[name][key] for name in names for key in COMPUTING & {*curves[name]}
    }
    least_s = statistics.median(watch.seconds(tiny(device)))
    return Device(
        name=name_of(device),
        memory_bytes=memory_bytes(device),
        matmul_flops_per_s=matmul,
        memory_bytes_per_s=memory.moved_bytes_per_s,
        operators_per_s=others,
        operator_s=least_s,
        update_params_per_s=update_params_per_s or memory.torch_params_per_s,
    )


def _link(device: torch.device, pool: ThreadPool) -> tuple[Link | None, float]:
    """Return the way to a GPU's memory and back, and the rate at which it updates."""
    if device.type != "cuda":
        return None, 0.0
    updates = CudaUpdates(device)
    try:
        rates = measure_rates(updates, pool, PARAMS, torch.bfloat16)
    finally:
        updates.close()
    ways = rates.to_host_bytes_per_s, rates.to_device_bytes_per_s
    both = sum(ways) if rates.duplex else max(ways)
    link = Link(to_host_bytes_per_s=ways[0], to_device_bytes_per_s=ways[1], both_bytes_per_s=both)
    return link, rates.device_params_per_s


def _host(memory: MemoryRounds) -> Host:
    return Host(
        memory_bytes=host_memory_bytes(),
        memory_bytes_per_s=memory.host_bytes_per_s,
        update_params_per_s=memory.host_params_per_s,
        cores=len(os.sched_getaffinity(0)),
    )
