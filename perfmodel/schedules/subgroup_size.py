"""How many parameters a subgroup of the optimizer's states has: what is moved and updated as one.

Many small ones pay what each costs beside its bytes; few large ones wait longer for the last to
come back, and take more memory for those that are on their way.
"""

from __future__ import annotations

from perfmodel.plan import PAGE_BYTES, OptimizerConfig
from perfmodel.schedules.updates import STATE_BYTES, UpdateRates

__all__ = ["LEAST_STAGED", "PAD_BYTES", "planned_subgroup_params", "streamed_subgroup_params"]

LEAST_STAGED = 3
"""Subgroups that staging has room for: one comes, one is in work, one goes."""
PAD_BYTES = 2 * PAGE_BYTES
"""What each takes in staging beside its own bytes."""
_MOMENT_BYTES = 8  # of a parameter: what at least comes from an SSD
_SMALLEST = 1 << 20
_SLACK = 0.01
_BUFFER_SHARE = 64  # of the device's memory, for the buffers of what moves
_BUFFERS = 2


def streamed_subgroup_params(settings: OptimizerConfig, *, from_ssd: bool) -> int:
    """Return a size whose reads keep a drive's queue full; of those `from_ssd` staging holds three.

    In memory the size makes no difference: an update's pass over the bytes is the same.
    """
    size = max(1, settings.block_bytes * settings.queue_depth // _MOMENT_BYTES)
    if from_ssd:
        room_bytes = settings.staging_bytes // LEAST_STAGED - PAD_BYTES
        size = min(size, max(1, room_bytes // STATE_BYTES))
    return size


def update_s(size: int, count: int, rates: UpdateRates) -> float:
    """Return about how long `count` parameters take beside a device in subgroups of `size`.

    Both sides are busy until the end, as with the best fractional share (Deep Optimizer States,
    Eq. 1, without its stride), but for the last subgroup's way back; each pays its fixed cost.
    """
    in_s, out_s = (
        STATE_BYTES * size / rate
        for rate in (rates.to_device_bytes_per_s, rates.to_host_bytes_per_s)
    )
    link_s = max(in_s, out_s) if rates.duplex else in_s + out_s
    moved_s = max(link_s, size / rates.device_params_per_s) + rates.subgroup_s
    host_s = size / rates.host_params_per_s + rates.subgroup_s
    return count / size / (1 / moved_s + 1 / host_s) + out_s


def planned_subgroup_params(
    count: int, rates: UpdateRates, *, device_bytes: float, most: int | None = None
) -> int:
    """Return the size with which `count` parameters are updated soonest beside a device.

    Of sizes within a hundredth of the best the smallest: buffers for what moves lie on the device,
    and take no more than a 64th of its `device_bytes`. No larger than `most`.
    """
    largest = int(device_bytes / _BUFFER_SHARE / _BUFFERS / STATE_BYTES)
    sizes = [_SMALLEST]
    while sizes[-1] < count and 2 * sizes[-1] <= largest:
        sizes.append(2 * sizes[-1])
    times = {size: update_s(size, max(count, size), rates) for size in sizes}
    enough_s = (1 + _SLACK) * min(times.values())
    best = min(size for size, seconds in times.items() if seconds <= enough_s)
    return best if most is None else min(best, most)
