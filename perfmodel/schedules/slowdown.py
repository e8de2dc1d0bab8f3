"""How much longer a step must become so that what it saves fits into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from perfmodel.schedules.activations import ActivationSchedule, plan_activations, quick_peak
from perfmodel.schedules.trace import Channel, Limits, Trace

__all__ = ["Slowdowns", "slowed_to_fit"]

# It is as if spread evenly, where the step in truth waits at a few moments: tensors needed right
# after each other take far more of it than the step becomes longer. Slowdowns so close to each
# other are as good as equal.
_MOST = 4095.0
_SAME = 1.02
_SAME_QUICK = 1.2


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
    return Slowdowns(trace, channels, limits).to_fit(plan, memory_bytes, effort)


class Slowdowns:
    """A trace in steps of any length. What was found out for one limit of memory serves the next.

    Without a limit of the window, a plan is the same whatever was asked for before.
    """

    def __init__(self, trace: Trace, channels: Sequence[Channel], limits: Limits) -> None:
        self._trace, self._channels, self._limits = trace, channels, limits
        self._quick: dict[float, tuple[int, int]] = {}  # of a slowdown: for which limit, the peak

    def to_fit(
        self, plan: ActivationSchedule, memory_bytes: int, effort: float = 1.0
    ) -> ActivationSchedule:
        """Return what `slowed_to_fit` does."""
        if plan.peak_bytes <= memory_bytes:
            return plan
        low, high = plan.slowdown, max(plan.slowdown, _MOST)
        target = max(memory_bytes, self._peak(high, memory_bytes))
        if plan.peak_bytes <= target:
            return plan
        same = _SAME if effort else _SAME_QUICK
        while 1 + high > same * (1 + low):
            middle = math.sqrt((1 + low) * (1 + high)) - 1
            if self._peak(middle, target) <= target:
                high = middle
            else:
                low = middle
        found = self._plan(high, target, effort)
        return self._less(found, plan.slowdown, target, effort) if effort else found

    def _less(
        self, found: ActivationSchedule, least: float, target: int, effort: float
    ) -> ActivationSchedule:
        """Return a plan with less slowdown than `found` has, where a thorough search finds one."""
        step = _SAME
        while step >= _SAME:  # it takes long, so that it goes down in growing steps
            less = max(least, (1 + found.slowdown) / step - 1)
            better = self._plan(less, target, effort)
            if better.peak_bytes <= target and less < found.slowdown:
                found, step = better, step * step
            else:
                step = math.sqrt(step) if step > _SAME else 0.0
        return found

    def _plan(self, slowdown: float, target: int, effort: float) -> ActivationSchedule:
        trace, channels, limits = self._trace, self._channels, self._limits
        return plan_activations(trace, channels, limits, target, slowdown=slowdown, effort=effort)

    def _peak(self, slowdown: float, target: int) -> int:
        """Return the peak of a quick plan, exact where it is above `target`."""
        if slowdown in self._quick:
            sought, peak = self._quick[slowdown]
            # A search ends with the first choice that meets what it looks for, and else tries all.
            if peak <= target or peak > sought:
                return peak
        peak = quick_peak(self._trace, self._channels, self._limits, target, slowdown)
        self._quick[slowdown] = target, peak
        return peak
