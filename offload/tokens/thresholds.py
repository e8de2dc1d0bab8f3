"""Thresholds of blocks' scores for each layer, from a profile and by finite differences.

LeMo (USENIX ATC '25), Algorithm 1: they begin at the mean of each layer's scores, and climb along
the slope of a model's accuracy. Step and rate are not in the paper; they are given here as shares
of each layer's first threshold, so that one number serves all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["first_thresholds", "tune_thresholds"]


def first_thresholds(profile: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the mean of each layer's scores, over all blocks of all sequences that were seen."""
    return tuple(sum(scores) / len(scores) for scores in profile)


def tune_thresholds(
    thresholds: Sequence[float],
    accuracy: Callable[[tuple[float, ...]], float],
    *,
    difference: float = 0.1,
    rate: float = 0.5,
    rounds: int = 1,
    gain: float = 1.0,
) -> tuple[float, ...]:
    """Return thresholds that `accuracy` likes better, layer by layer.

    `accuracy` is of the model with such thresholds, larger where better: minus its loss, say, and
    minus what a kept share costs. Of each layer it is asked twice a round, a `difference` up and
    down; the threshold then moves by `rate` times the slope over `gain`, what accuracy is worth as
    much as the whole threshold, and by no more than a `difference` at once, nor below 0. Raises
    ValueError for a gain that is not over 0, and where accuracy is no number.
    """
    if not 0 < gain < math.inf:
        raise ValueError(f"gain={gain} is not a number over 0")
    first, found = list(thresholds), list(thresholds)
    for _ in range(rounds):
        for layer, begin in enumerate(first):
            step = difference * begin
            if step <= 0:
                continue
            sides = []
            for sign in (1, -1):
                tried = [*found]
                tried[layer] += sign * step
                sides.append(accuracy(tuple(tried)))
                if not math.isfinite(sides[-1]):  # nothing climbs along it
                    raise ValueError(f"accuracy is {sides[-1]} with thresholds={tried}")
            slope = (sides[0] - sides[1]) / (2 * difference)
            moved = max(-difference, min(difference, rate * slope / gain))
            found[layer] = max(0.0, found[layer] + moved * begin)
    return tuple(found)
