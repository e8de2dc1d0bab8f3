"""The machine that this runs on, as the performance model takes it."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from offload.calibrate.beside import measure_held_up
from offload.calibrate.drive import measure_drive
from offload.calibrate.operators import COMPUTING, Piece, operator_pieces, seconds_of, tiny
from offload.calibrate.timing import Stopwatch, curve_of
from offload.device import num_devices
from offload.device.cuda_updates import CudaUpdates
from offload.device.present import host_memory_bytes, memory_bytes, name_of, present_device
from offload.native import AdamSettings, ThreadPool, adam_update
from offload.optimizer.calibration import measure_rates
from perfmodel.machine import Curve, Device, Host, Link, Machine

__all__ = ["calibrate"]

_ROUNDS = 3
_SETTINGS = AdamSettings(lr=0.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
_HOST_PARAMS = 8 << 20
_COPIED_MIB = (1, 8, 64)
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
    operators = _operators(watch, rounds, progress)
    missing = [] if drive else ["drive: no PATH was given"]
    missing += [] if link else ["link: this device's memory is the host's"]
    missing += ["network_bytes_per_s: it takes several ranks"]
    if drive:
        missing.append("drive.rated_bytes: its maker says how much may be written to it (TBW)")
    return Machine(
        name="present",
        source="measured by `offload calibrate`",
        devices=max(1, num_devices()) if chosen.type == "cuda" else 1,
        device=_device(watch, operators, update_params_per_s),
        host=_host(pool),
        link=link,
        drive=drive,
        not_measured=tuple(missing),
    )


def _operators(watch: Stopwatch, rounds: int, progress: Callable[[float], object]) -> Seconds:
    """Return the seconds of every piece of work."""
    kind = watch.device.type
    pieces = [
        piece
        for dtype in _DTYPES[kind]
        for piece in operator_pieces(watch.device, dtype, _OPERATOR_MIB[kind])
    ]
    found: Seconds = defaultdict(list)
    for turn in range(rounds):
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


def _device(watch: Stopwatch, found: Seconds, update_params_per_s: float) -> Device:
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
        memory_bytes_per_s=_moved(watch),
        operators_per_s=others,
        operator_s=least_s,
        update_params_per_s=update_params_per_s or _torch_update(watch),
    )


def _moved(watch: Stopwatch) -> Curve:
    """Return the bytes a second of an operator that reads two tensors and makes one."""
    measured = []
    for mib in _COPIED_MIB:
        count = (mib << 20) // 12
        x, y, z = (torch.ones(count, device=watch.device) for _ in range(3))
        nbytes = 12.0 * count
        measured.append((nbytes, nbytes, watch.seconds(partial(torch.add, x, y, out=z))))
    return curve_of(measured)


def _torch_update(watch: Stopwatch) -> float:
    """Return the parameters a second of torch's own AdamW, in fp32."""
    param = torch.nn.Parameter(torch.zeros(_HOST_PARAMS, device=watch.device))
    param.grad = torch.ones_like(param)
    optimizer = torch.optim.AdamW([param], lr=0.0, fused=True)
    return _HOST_PARAMS / statistics.median(watch.seconds(optimizer.step))


def _link(device: torch.device, pool: ThreadPool) -> tuple[Link | None, float]:
    """Return the way to a GPU's memory and back, and the rate at which it updates."""
    if device.type != "cuda":
        return None, 0.0
    updates = CudaUpdates(device)
    try:
        rates = measure_rates(updates, pool, _HOST_PARAMS, torch.bfloat16)
    finally:
        updates.close()
    ways = rates.to_host_bytes_per_s, rates.to_device_bytes_per_s
    both = sum(ways) if rates.duplex else max(ways)
    link = Link(to_host_bytes_per_s=ways[0], to_device_bytes_per_s=ways[1], both_bytes_per_s=both)
    return link, rates.device_params_per_s


def _host(pool: ThreadPool) -> Host:
    watch = Stopwatch(torch.device("cpu"))
    states = torch.zeros(3, _HOST_PARAMS)
    low = torch.zeros(2, _HOST_PARAMS, dtype=torch.bfloat16)

    def update() -> None:
        adam_update(
            pool,
            _SETTINGS,
            1,
            grad=low[0],
            master_param=states[0],
            exp_avg=states[1],
            exp_avg_sq=states[2],
            param=low[1],
        )

    copied_s = statistics.median(watch.seconds(lambda: states[0].copy_(states[1])))
    return Host(
        memory_bytes=host_memory_bytes(),
        memory_bytes_per_s=2.0 * states[0].nbytes / copied_s,
        update_params_per_s=_HOST_PARAMS / statistics.median(watch.seconds(update)),
        cores=len(os.sched_getaffinity(0)),
    )
