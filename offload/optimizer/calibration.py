"""What a device, its link and the host do while states are updated, measured on scratch memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from offload.config import OptimizerConfig
from offload.device import Moment
from offload.device.updates import Arrays, UpdateDevice
from offload.native import AdamSettings, ThreadPool
from offload.optimizer.sharded import local_part
from perfmodel.schedules.subgroup_size import planned_subgroup_params, streamed_subgroup_params
from perfmodel.schedules.updates import STATE_BYTES, UpdateRates

__all__ = ["measure_rates", "with_subgroup_params"]

_REPEATS = 5
# Of the time alone: what is slower than that beside copies is held up by them.
_HELD_UP = 1.05
# Of both directions' times one after the other: what takes less runs both at once.
_AT_ONCE = 0.75
_SETTINGS = AdamSettings(lr=0.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)


def with_subgroup_params(
    config: OptimizerConfig,
    params: Iterable[torch.Tensor],
    device: UpdateDevice | None,
    pool: ThreadPool,
) -> OptimizerConfig:
    """Return `config` with how many parameters a subgroup has, where that is left to the model.

    Measures the device and its link where it is also left to that what is updated there.
    """
    if config.subgroup_params is not None:
        return config
    return replace(config, subgroup_params=_chosen(config, params, device, pool))


def _chosen(
    config: OptimizerConfig,
    params: Iterable[torch.Tensor],
    device: UpdateDevice | None,
    pool: ThreadPool,
) -> int:
    streamed = streamed_subgroup_params(config, from_ssd="ssd" in config.shares)
    counts: dict[torch.dtype, int] = {}
    for param in params:
        if param.is_floating_point():
            counts[param.dtype] = counts.get(param.dtype, 0) + local_part(param).numel()
    count = sum(counts.values())
    if device is None or not count or config.update_schedule != "auto":
        return streamed
    dtype = max(counts, key=lambda each: counts[each])
    rates = measure_rates(device, pool, min(count, streamed), dtype)
    return planned_subgroup_params(
        count,
        rates,
        device_bytes=device.free_bytes(),
        most=streamed if "ssd" in config.shares else None,
    )


def measure_rates(
    device: UpdateDevice, pool: ThreadPool, params: int, param_dtype: torch.dtype
) -> UpdateRates:
    """Time copies and updates of a subgroup of `params`, some times each, and return the medians.

    Takes memory for one subgroup's states on the device and three on the host while it runs, and
    nothing else may use the device meanwhile.
    """
    probe = _Probe(device, pool, params, param_dtype)
    try:
        in_s, out_s = probe.seconds(probe.copy_in), probe.seconds(probe.copy_out)
        both_s = probe.seconds(lambda: [*probe.copy_in(), *probe.copy_out()])
        # Two sizes tell what an update costs beside its parameters.
        whole_s = probe.seconds(lambda: probe.update(params))
        quarter_s = probe.seconds(lambda: probe.update(max(1, params // 4)))
        fixed_s = min(max(0.0, (4 * quarter_s - whole_s) / 3), whole_s / 2)
        queued_s = probe.seconds_to_queue()
        host_s = probe.seconds(probe.update_on_host)
        held_s = probe.seconds_beside_copies(host_s, in_s, out_s)
    finally:
        probe.close()
    states_bytes, param_bytes = STATE_BYTES * params, param_dtype.itemsize
    memory_per_s = math.inf
    if held_s > _HELD_UP * host_s:
        own_bytes = 2 * states_bytes + 2 * param_bytes * params
        memory_per_s = own_bytes / held_s + states_bytes / in_s + states_bytes / out_s
    return UpdateRates(
        device_params_per_s=params / (whole_s - fixed_s),
        host_params_per_s=params / host_s,
        to_device_bytes_per_s=states_bytes / in_s,
        to_host_bytes_per_s=states_bytes / out_s,
        host_memory_bytes_per_s=memory_per_s,
        duplex=both_s < _AT_ONCE * (in_s + out_s),
        subgroup_s=max(fixed_s, queued_s),
        param_bytes=param_bytes,
    )


class _Probe:
    """A subgroup's memory on both sides, in which nothing is of use to anybody."""

    def __init__(
        self, device: UpdateDevice, pool: ThreadPool, params: int, param_dtype: torch.dtype
    ) -> None:
        self._device, self._pool, self._params = device, pool, params
        self._near = torch.zeros(3, params, device=device.device)
        self._near_low = torch.zeros(2, params, device=device.device, dtype=param_dtype)
        # One to come from, one to go to, and one to be updated.
        self._far = torch.zeros(3, 3, params)
        self._far_low = torch.zeros(2, params, dtype=param_dtype)
        device.pin(self._far.data_ptr(), self._far.nbytes)

    def close(self) -> None:
        """Give the memory back."""
        self._device.unpin(self._far.data_ptr())

    def seconds(self, begin: Callable[[], Sequence[Moment]]) -> float:
        """Return the median time until all that `begin` begins has been done."""
        return statistics.median(self._seconds_once(begin) for _ in range(_REPEATS))

    def _seconds_once(self, begin: Callable[[], Sequence[Moment]]) -> float:
        begin_s = time.perf_counter()
        for moment in begin():
            moment.synchronize()
        return time.perf_counter() - begin_s

    def seconds_to_queue(self) -> float:
        """Return the median time that the calling thread takes to queue one that moves."""
        seconds = []
        for _ in range(_REPEATS):
            begin_s = time.perf_counter()
            moments = [*self.copy_in(), *self.update(1), *self.copy_out()]
            seconds.append(time.perf_counter() - begin_s)
            for moment in moments:
                moment.synchronize()
        return statistics.median(seconds)

    def seconds_beside_copies(self, host_s: float, in_s: float, out_s: float) -> float:
        """Return the median time of an update on the host while both directions are busy."""
        seconds = []
        for _ in range(_REPEATS):
            copies = [self.copy_in() for _ in range(math.ceil(host_s / in_s) + 1)]
            copies += [self.copy_out() for _ in range(math.ceil(host_s / out_s) + 1)]
            seconds.append(self._seconds_once(self.update_on_host))
            for moments in copies:
                moments[0].synchronize()
        return statistics.median(seconds)

    def copy_in(self) -> Sequence[Moment]:
        """Begin a copy of a subgroup's states to the device."""
        return [self._device.copy("states in", self._far[0], self._near, ())]

    def copy_out(self) -> Sequence[Moment]:
        """Begin one back."""
        return [self._device.copy("states out", self._near, self._far[1], ())]

    def update(self, params: int) -> Sequence[Moment]:
        """Begin an update on the device."""
        arrays = _arrays(self._near, self._near_low, params)
        return [self._device.update(_SETTINGS, 1, arrays, clip=1.0, after=())]

    def update_on_host(self) -> Sequence[Moment]:
        """Update on the host."""
        arrays = _arrays(self._far[2], self._far_low, self._params)
        self._device.update_on_host(self._pool, _SETTINGS, 1, arrays, clip=1.0)
        return []


def _arrays(states: torch.Tensor, low: torch.Tensor, params: int) -> Arrays:
    exp_avg, exp_avg_sq, master_param = (row[:params] for row in states)
    return Arrays(low[0][:params], master_param, exp_avg, exp_avg_sq, low[1][:params])
