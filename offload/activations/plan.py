"""What a forward of one kind does, as the schedule book has made it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from offload.activations.rates import Throughput
from perfmodel.schedules.activations import ActivationSchedule

__all__ = ["Plan"]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a forward with these region sizes does."""

    sizes: tuple[int, ...]
    tiers: tuple[str, ...]
    """Of each region; `device` for those that stay."""
    order: tuple[int, ...]
    """Of the regions, as the backward wants them."""
    due: tuple[int, ...]
    """For each place in `order`: the last place whose read has begun by then."""
    due_first: int
    """The same before the backward asks for anything; -1 for none."""
    depth: int
    """How many forwards were under way at once with one of this kind."""
    schedule: ActivationSchedule
    rates: Mapping[str, Throughput]
    """What the tiers' ways were taken to do."""
    confirmed: bool
    """Made from a step that was not the first of its kind, which is slower than the others."""
    small_bytes: int
    """What such a forward saves in tensors that are too small to leave."""
    slowdown: float
    """How much longer, as a part of it, the step is expected to be by waiting."""
    held: frozenset[int]
    """Regions that somebody else kept in memory when they were last seen to leave."""
