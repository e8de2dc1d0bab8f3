"""Searches what a planner may choose for the step that fits and takes the least time.

What becomes of activations and what becomes of states are each computed once; every pair of them is
then a sum of seconds and bytes, so that a hundred thousand strategies are compared in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from perfmodel.choices import ActivationChoice, Searched, StatesChoice
from perfmodel.endurance import needed_per_day
from perfmodel.machine import Machine
from perfmodel.plan_file import Limits
from perfmodel.prediction import Prediction, combined, device_memory_bytes
from perfmodel.units import format_bytes
from perfmodel.workload import Strategy, Workload

__all__ = ["Choice", "Found", "Search", "limits_of", "plan"]

_SAME = 1.005
"""Steps so close to each other are equally fast: what moves less, or is simpler, comes first."""
_SPARED = 1.1
"""By so much less is moved, or a limit of memory is not worth having."""
# Of a host's memory: what the system and the processes themselves need.
_HOST_PART = 0.9
# What leaves is searched for as in a run so many times, which takes a tenth of a second or more.
_MOST_SETTLED, _MOST_TRIED = 6, 12
# By so much a quick search may find more to be on the device than a run does.
_QUICK_EXCESS = 1.06
_SIMPLE = ("keep", "recompute", "host", "ssd")


@dataclass(frozen=True, kw_only=True)
class Search:
    """What may be chosen; the defaults are everything that the machine and framework have."""

    activations: tuple[str, ...] = ("keep", "recompute", "host", "ssd")
    optimizers: tuple[str, ...] = ("offload", "torch")
    placements: tuple[str, ...] = ("device", "host", "ssd")
    micro_batches: tuple[int, ...] = ()
    """None: every one that divides the step's sequences of a rank."""
    zero_stages: tuple[int, ...] = ()
    """None: the workload's own."""
    pipelines: tuple[int, ...] = ()
    """None: the workload's own. Ranks that are in none share batches."""
    fine: int = 8
    """In how many steps the shares of states are tried."""
    refusal: Callable[[Workload, Strategy], str] | None = None
    """Says in a line why one is not to be chosen, and nothing where it may be."""


@dataclass(frozen=True)
class Choice:
    """A strategy that fits."""

    name: str
    """`fastest`, `least memory` or `least wear`."""
    prediction: Prediction
    why: str
    """One sentence."""


@dataclass(frozen=True)
class Found:
    """What came of a search. `choices`: the best first; none where nothing fits."""

    choices: tuple[Choice, ...]
    tried: int
    fitting: int
    closest: Prediction | None = None
    """Where nothing fits: what comes closest."""
    over: Mapping[str, int] | None = None
    """Where nothing fits: by how many bytes that is over each limit."""
    change: str = ""
    """Where nothing fits: the smallest change with which something would."""


def plan(
    workload: Workload, machine: Machine, limits: Limits | None = None, search: Search | None = None
) -> Found:
    """Return the best strategies for `workload` within `limits` and what the machine has.

    Raises ValueError for a workload that the machine cannot run at all.
    """
    return _Planned(workload, machine, limits or Limits(), search or Search()).found()


def limits_of(machine: Machine, limits: Limits) -> dict[str, float]:
    """Return the limits of one rank, those of the machine where none is given."""
    ranks, drive = machine.devices, machine.drive
    alone = machine.link is None
    host = int(_HOST_PART * machine.host.memory_bytes / ranks)
    device = host if alone else machine.device.memory_bytes
    on_device = [limits.device_bytes]
    if alone:  # what is the host's is the device's
        on_device += [limits.host_bytes]
    least = min((each for each in on_device if each is not None), default=None)
    given = {
        "device_bytes": (least, device),
        "host_bytes": (limits.host_bytes, host),
        "pinned_bytes": (limits.pinned_bytes, host),
        "ssd_bytes": (limits.ssd_bytes, drive.free_bytes if drive else 0),
        "ssd_write_bytes_per_day": (limits.ssd_write_bytes_per_day, None),
    }
    found = {
        key: otherwise if value is None else value for key, (value, otherwise) in given.items()
    }
    return {
        key: value / (ranks if key in _SHARED else 1)
        for key, value in found.items()
        if value is not None
    }


@dataclass(frozen=True, slots=True)
class _Sum:
    """One pair, as far as it is compared."""

    step_s: float
    uses: tuple[float, ...]
    """Of what `_LIMITED` names."""
    written: float
    activations: ActivationChoice
    states: StatesChoice


_NAMED = {
    "device_bytes": "device memory",
    "host_bytes": "host memory",
    "ssd_bytes": "space on the SSD",
    "ssd_write_bytes_per_day": "writes to the SSD a day",
}
_SHARED = ("ssd_bytes", "ssd_write_bytes_per_day")  # of all ranks of a node
_SHORTEST = 64  # a sequence that is this many times shorter is another task
_LIMITED = ("device_bytes", "host_bytes", "pinned_bytes", "ssd_bytes", "ssd_write_bytes_per_day")


class _Planned:
    """All pairs of a search, and which of them fit."""

    def __init__(
        self, workload: Workload, machine: Machine, limits: Limits, search: Search
    ) -> None:
        self._workload, self._machine, self._search = workload, machine, search
        self._searched = Searched(workload, machine, search.fine)
        self._limits = limits
        allowed = limits_of(machine, limits)
        self._bounds = {key: allowed.get(key, math.inf) for key in _LIMITED}
        self._room = self._bounds["device_bytes"]
        self._refused = ""

    @cached_property
    def _sums(self) -> list[_Sum]:
        search = self._search
        sums = list(self._pairs(lambda _: True))
        if not sums and self._refused:
            raise ValueError(self._refused)
        if not sums and search.pipelines:
            raise ValueError(
                f"pipelines={search.pipelines}: no number of stages divides the ranks and their "
                "sequences (and goes with the stage of ZeRO: 3 does not)"
            )
        if not sums:
            raise ValueError(
                f"{self._machine.name!r} has nothing to choose from: "
                f"{', '.join(search.activations)} with {', '.join(search.placements)}"
            )
        return sums

    def _states(self) -> Iterator[list[StatesChoice]]:
        """Yield what may become of states in each of the workloads."""
        search, searched = self._search, self._searched
        for workload in searched.workloads(
            search.micro_batches, search.zero_stages, search.pipelines
        ):
            yield list(searched.states(workload, search.optimizers, search.placements))

    def _pairs(self, wanted: Callable[[StatesChoice], bool]) -> Iterator[_Sum]:
        """Yield all pairs with the states that are wanted."""
        modes = self._search.activations
        for states in self._states():
            some = [each for each in states if wanted(each)]
            if not some:
                continue
            for activations in self._searched.activations(modes, self._room, states):
                for each in some:
                    if not self._refuses(activations, each):
                        yield _sum(activations, each, self._machine)

    def _refuses(self, activations: ActivationChoice, states: StatesChoice) -> bool:
        """Say whether a pair is not to be chosen, and keep the first reason."""
        if self._search.refusal is None:
            return False
        strategy = activations.strategy.with_states_of(states.strategy)
        said = self._search.refusal(states.workload, strategy)
        self._refused = self._refused or said
        return bool(said)

    def anything_fits(self) -> bool:
        """Say whether a pair keeps to all limits, without going through more than it takes."""
        bounds = tuple(self._bounds.values())
        return any(_within(each.uses, bounds) for each in self._pairs(self._fits_alone))

    def _fits_alone(self, states: StatesChoice) -> bool:
        """Say whether states would fit if there were no activations."""
        uses = (
            device_memory_bytes(max(states.device_bytes), self._machine),
            max(states.host_bytes),
            states.pinned_bytes,
            states.ssd_bytes,
        )
        return all(use <= self._bounds[key] for key, use in zip(_LIMITED, uses, strict=False))

    def fitting(self, but: Sequence[str] = ()) -> list[_Sum]:
        """Return what keeps to all limits, or to all but some."""
        bounds = tuple(math.inf if key in but else most for key, most in self._bounds.items())
        return [each for each in self._sums if _within(each.uses, bounds)]

    def found(self) -> Found:
        """Return what came of it."""
        tried = len(self._sums)
        if chosen := self._chosen():
            return Found(chosen, tried, len(self.fitting()))
        closest = min(self._sums, key=self._most_over)
        uses = zip(_LIMITED, closest.uses, self._bounds.values(), strict=True)
        over = {key: round(use - most) for key, use, most in uses if use > most}
        predicted = _predicted(closest, self._machine)
        return Found((), tried, 0, predicted, over, self._change())

    def _chosen(self) -> tuple[Choice, ...]:
        """Return the best and the few that matter; none where nothing fits."""
        best = self._settled(_fastest, likely=True)
        small, gentle = self._settled(_smallest), self._settled(_gentlest)
        if best is None or small is None or gentle is None:
            return ()
        least_s, fitting = best.step_s, len(self.fitting())
        best = self._refined(best)
        choices = [("fastest", best, f"no other of {fitting} that fit takes less time")]
        if small.uses[0] < 0.99 * best.uses[0]:
            less, longer = best.uses[0] - small.uses[0], small.step_s / least_s - 1
            why = f"{format_bytes(less)} less on the device for a step {longer:.0%} longer"
            choices.append(("least memory", small, why))
        if gentle.written < best.written:
            why = (
                f"it writes {format_bytes(gentle.written)} a step instead of "
                f"{format_bytes(best.written)}, in a step {gentle.step_s / least_s - 1:.0%} longer"
            )
            choices.append(("least wear", gentle, why))
        return tuple(
            Choice(name, _predicted(one, self._machine), why) for name, one, why in choices
        )

    def _settled(
        self, pick: Callable[[Sequence[_Sum]], _Sum], *, likely: bool = False
    ) -> _Sum | None:
        """Return what is picked of all that fits, and still is with what leaves as in a run.

        A run searches longer for what leaves than thousands of strategies could be searched for,
        and what it finds may be another. `likely`: a few of those that may fit so come first.
        """
        for tried in range(_MOST_TRIED):
            fits = self._may_fit if likely and tried < _MOST_SETTLED else self._fits
            some = [each for each in self._sums if fits(each)]
            if not some:
                return None
            one = pick(some)
            if one.activations.thorough:
                return one
            thorough = self._searched.thorough(one.activations, one.states.workload)
            for at, each in enumerate(self._sums):
                if each.activations is one.activations:
                    self._sums[at] = _sum(thorough, each.states, self._machine)
        sure = [each for each in self.fitting() if each.activations.thorough]
        return pick(sure) if sure else None

    def _fits(self, one: _Sum) -> bool:
        """Say whether a pair keeps to all limits."""
        return _within(one.uses, tuple(self._bounds.values()))

    def _may_fit(self, one: _Sum) -> bool:
        """Say whether a pair fits, or may with what leaves as in a run."""
        uses = one.uses
        if not one.activations.thorough:
            uses = (uses[0] / _QUICK_EXCESS, *uses[1:])
        return _within(uses, tuple(self._bounds.values()))

    def _refined(self, one: _Sum) -> _Sum:
        """Return `one` moving no more than it must.

        Where that spares little it stays as it is: a run that is held to a limit of memory waits
        for room, by a few hundredths of a step that no schedule foresees.
        """
        less = self._searched.refined(one.activations, self._room, one.states)
        other = _sum(less, one.states, self._machine)
        before = one.activations.step.moved_bytes
        spares = _SAME * other.step_s < one.step_s or _SPARED * less.step.moved_bytes < before
        return other if spares and self._fits(other) else one

    def _most_over(self, one: _Sum) -> float:
        bounds = self._bounds.values()
        return max(use / max(1.0, most) for use, most in zip(one.uses, bounds, strict=True))

    def _change(self) -> str:
        """Return in words the smallest changes with which something would fit."""
        offers = []
        for key, name in _NAMED.items():
            some = self.fitting((key, "pinned_bytes") if key == "host_bytes" else (key,))
            if some and (key not in _SHARED or self._machine.drive is not None):
                ranks = self._machine.devices if key in _SHARED else 1
                needs = ranks * min(each.uses[_LIMITED.index(key)] for each in some)
                have = ranks * self._bounds[key]
                offers.append(f"{format_bytes(needs)} of {name} (now {format_bytes(have)})")
        if shorter := self._shorter():
            offers.append(f"seq_len={shorter} (now {self._workload.seq_len})")
        said = (
            f"it would fit with {', or '.join(offers)}" if offers else "no single change would do"
        )
        return f"{said}; not among what was tried: {self._refused}" if self._refused else said

    def _shorter(self) -> int:
        """Return the longest half, quarter and so on of the sequence with which something fits."""
        # States are the same for any length.
        if not any(self._fits_alone(each) for states in self._states() for each in states):
            return 0
        length, least = self._workload.seq_len // 2, self._workload.seq_len // _SHORTEST
        # What needs least memory, of what may be chosen.
        sizes = (min(self._search.micro_batches, default=1),)
        search = replace(self._search, micro_batches=sizes, fine=1)
        while length >= max(1, least):
            try:
                shorter = replace(self._workload, seq_len=length)
                if _Planned(shorter, self._machine, self._limits, search).anything_fits():
                    return length
            except ValueError:  # ranks along the sequence do not divide it
                return 0
            length //= 2
        return 0


def _within(uses: Sequence[float], bounds: Sequence[float]) -> bool:
    return all(use <= most for use, most in zip(uses, bounds, strict=True))


def _sum(activations: ActivationChoice, states: StatesChoice, machine: Machine) -> _Sum:
    step_s, written = activations.step_s(states), activations.written(states)
    uses = (
        activations.device_bytes(states, machine),
        max(states.host_bytes[0] + activations.host_bytes, states.host_bytes[1]),
        states.pinned_bytes + activations.host_bytes,
        states.ssd_bytes + activations.ssd_bytes,
        needed_per_day(written / step_s),
    )
    return _Sum(step_s, uses, written, activations, states)


def _predicted(one: _Sum, machine: Machine) -> Prediction:
    chosen = one.states.strategy
    strategy = one.activations.strategy.with_states_of(chosen)
    workload, step = one.states.workload, one.activations.step
    return combined(workload, strategy, machine, step, one.states.update)


def _fastest(some: Sequence[_Sum]) -> _Sum:
    """Return the simplest of those that are as fast as the fastest."""
    soon_s = min(each.step_s for each in some) * _SAME
    return min((each for each in some if each.step_s <= soon_s), key=_simplicity)


def _smallest(some: Sequence[_Sum]) -> _Sum:
    """Return the fastest of those with about the least on the device."""
    least = min(each.uses[0] for each in some)
    return _fastest([each for each in some if each.uses[0] <= 1.01 * least])


def _gentlest(some: Sequence[_Sum]) -> _Sum:
    """Return the fastest of those that write least."""
    fewest = min(each.written for each in some)
    return _fastest([each for each in some if each.written <= fewest])


def _simplicity(one: _Sum) -> tuple[float, int, int, float]:
    """Return what is less for what moves less, and is simpler."""
    strategy = one.activations.strategy
    moves = _SIMPLE.index(strategy.activations) + ("device" not in one.states.strategy.placement)
    return one.written, moves, one.activations.step.moved_bytes, one.step_s
