"""How much longer a step must become so that what it saves fits into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from perfmodel.schedules.activations import ActivationSchedule, plan_activations
from perfmodel.schedules.trace import Channel, Limits, Trace

__all__ = ["slowed_to_fit"]

# It is as if spread evenly, where the step in truth waits at a few moments: tensors needed right
# after each other take far more of it than the step becomes longer. Slowdowns so close to each
# other are as good as equal.
_MOST = 4095.0
_SAME = 1.02


def slowed_to_fit(
    plan: ActivationSchedule,
    trace: Trace,
    channels: Sequence[Channel],
    limits: Limits,
    memory_bytes: int,
    effort: float = 1.0,
) -> ActivationSchedule:
    """Return `plan`, or where its peak is above `memory_bytes` one that slows the step down more.

    With the least slowdown by which the peak fits, or comes as close as it can. `effort`: as for
    `plan_activations`.
    """
    if plan.peak_bytes <= memory_bytes:
        return plan

    def tried(slowdown: float, target: int, *, effort: float) -> ActivationSchedule:
        return plan_activations(trace, channels, limits, target, slowdown=slowdown, effort=effort)

    low, high = plan.slowdown, max(plan.slowdown, _MOST)
    found = tried(high, memory_bytes, effort=0.0)
    target = max(memory_bytes, found.peak_bytes)
    if plan.peak_bytes <= target:
        return plan
    while 1 + high > _SAME * (1 + low):
        middle = math.sqrt((1 + low) * (1 + high)) - 1
        if tried(middle, target, effort=0.0).peak_bytes <= target:
            high = middle
        else:
            low = middle
    found, step = tried(high, target, effort=effort), _SAME
    # A thorough search may do with less. It takes long, so that it goes down in growing steps.
    while step >= _SAME:
        less = max(plan.slowdown, (1 + found.slowdown) / step - 1)
        better = tried(less, target, effort=effort)
        if better.peak_bytes <= target and less < found.slowdown:
            found, step = better, step * step
        else:
            step = math.sqrt(step) if step > _SAME else 0.0
    return found
