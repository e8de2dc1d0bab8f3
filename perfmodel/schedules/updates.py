"""Which subgroups of the optimizer's states are updated on the device, and what a step takes then.

The states of a subgroup (fp32 master parameters and two moments) lie on the device for good, or on
the host. Of those on the host, some go to the device, are updated there and come back, while the
host's processor updates others: what moves and what is computed take the same time at best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from perfmodel.plan import update_schedule_of
from perfmodel.timeline import Task, Timeline, simulate

__all__ = [
    "STATE_BYTES",
    "UpdateRates",
    "UpdateSchedule",
    "named_schedule",
    "plan_updates",
    "ratio_schedule",
    "share_schedule",
    "simulate_updates",
    "stride_schedule",
]

STATE_BYTES = 12
"""Of a parameter: an fp32 master copy and two fp32 moments."""

PLACES = ("resident", "moved", "host")
MEMORY = "host memory"


@dataclass(frozen=True, kw_only=True)
class UpdateRates:
    """What one rank's share of a machine does. Raises ValueError unless all rates are positive."""

    device_params_per_s: float
    """Updated on the device."""
    host_params_per_s: float
    """Updated on the host, gradient and parameter in their own precision included."""
    to_device_bytes_per_s: float
    to_host_bytes_per_s: float
    host_memory_bytes_per_s: float = math.inf
    """What goes through host memory, of updates and copies together."""
    duplex: bool = True
    """Copies of both directions run at once."""
    subgroup_s: float = 0.0
    """What each subgroup costs beside its bytes: launches, events, waking threads."""
    param_bytes: int = 2
    """Of a parameter as the model uses it; its gradient has as many."""
    params_on: str = "device"
    """Where parameters and gradients are: `device`, or `host` beside their states."""

    def __post_init__(self) -> None:
        """Check the rates."""
        if self.params_on not in ("device", "host"):
            raise ValueError(f"params_on={self.params_on!r} is neither device nor host")
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, (bool, str)):
                continue
            enough = value >= 0 if one.name == "subgroup_s" else value > 0
            if not enough:
                raise ValueError(f"{one.name}={value!r} of the machine is too small")


@dataclass(frozen=True)
class UpdateSchedule:
    """Where each subgroup is updated, in the order of the step.

    Raises ValueError for a place that there is not, sizes that do not match, or no buffer.
    """

    sizes: tuple[int, ...]
    """Of each subgroup, in parameters."""
    places: tuple[str, ...]
    """`resident` on the device, `moved` there and back, or updated on the `host`."""
    buffers: int = 2
    """How many moved subgroups may be on the device at once."""

    def __post_init__(self) -> None:
        """Check the places."""
        wrong = set(self.places) - set(PLACES)
        if wrong or len(self.places) != len(self.sizes) or min(self.sizes, default=1) <= 0:
            raise ValueError(
                f"{len(self.sizes)} subgroups of {self.sizes} have the places {self.places}: "
                f"each needs one of {', '.join(PLACES)}, and at least one parameter"
            )
        if self.buffers < 1:
            raise ValueError(f"buffers={self.buffers} cannot hold any subgroup that moves")

    def share(self, place: str) -> float:
        """Return which part of all parameters is updated at `place`."""
        total = sum(self.sizes)
        pairs = zip(self.sizes, self.places, strict=True)
        return sum(size for size, where in pairs if where == place) / total if total else 0.0


def _at_the_tail(sizes: Sequence[int], share: float) -> int:
    """Return the number of the first resident subgroup: the last `share` of parameters stay.

    They are the last, so that what moved before can come back while they are updated.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of {share!r} is not between 0 and 1")
    left, first = share * sum(sizes), len(sizes)
    while first and left >= sizes[first - 1] * (1 - 1e-9):
        first -= 1
        left -= sizes[first]
    return first


def share_schedule(
    sizes: Sequence[int], share: float, *, resident: float = 0.0, buffers: int = 2
) -> UpdateSchedule:
    """Move `share` of what is not resident, evenly spread; the last `resident` of all stay."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share of {share!r} is not between 0 and 1")
    first = _at_the_tail(sizes, resident)
    places, owed = [], 0.0
    for size in sizes[:first]:
        owed += share * size
        moves = owed >= size / 2  # as close to the share as whole subgroups come
        places.append("moved" if moves else "host")
        owed -= size if moves else 0
    places += ["resident"] * (len(sizes) - first)
    return UpdateSchedule(tuple(sizes), tuple(places), buffers)


def stride_schedule(
    sizes: Sequence[int], stride: int, *, resident: float = 0.0, buffers: int = 1
) -> UpdateSchedule:
    """Return the published schedule of Deep Optimizer States: each `stride`-th subgroup moves.

    As its code has it (`(x + 1) % k == 0` in stage3.py): with 1 all of them, with 0 none. It has
    one set of buffers.
    """
    if stride < 0:
        raise ValueError(f"a stride of {stride} is not 0 (none moves) or more")
    first = _at_the_tail(sizes, resident)
    moved = ("moved" if stride and not (x + 1) % stride else "host" for x in range(first))
    places = (*moved, *["resident"] * (len(sizes) - first))
    return UpdateSchedule(tuple(sizes), places, buffers)


def ratio_schedule(sizes: Sequence[int], ratio: float) -> UpdateSchedule:
    """Return DeepSpeed's `offload_optimizer.ratio`: the first part on the host, the rest resident.

    As its code has it (stage3.py): the first `int(ratio * N)` of N subgroups.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio!r} is not between 0 and 1")
    first = int(ratio * len(sizes))
    places = ("host",) * first + ("resident",) * (len(sizes) - first)
    return UpdateSchedule(tuple(sizes), places)


def named_schedule(name: str, sizes: Sequence[int], *, resident: float = 0.0) -> UpdateSchedule:
    """Return the schedule that `OptimizerConfig.update_schedule` names, other than `auto`."""
    kind, number = update_schedule_of(name)
    if kind == "share":
        return share_schedule(sizes, number, resident=resident)
    if kind == "stride":
        return stride_schedule(sizes, int(number), resident=resident)
    raise ValueError(f"update_schedule={name!r} is to be planned, which takes rates")


def tasks_of(schedule: UpdateSchedule, rates: UpdateRates) -> list[Task]:
    """Return what an update does, in the order in which each queue is asked for it.

    Gradients have reached the place of the update before; parameters go back to the device after.
    Where both are on the host, what moves takes the one along, and brings the other.
    """
    up, down = ("to device", "to host") if rates.duplex else ("link", "link")
    tasks: list[Task] = []
    gone: list[int] = []  # the copies back of what moved

    def copy(queue: str, way: str, nbytes: float, rate: float, *after: int) -> int:
        seconds = nbytes / rate
        return add(queue, seconds, *after, uses=((way, seconds), (MEMORY, nbytes)))

    def add(
        queue: str, seconds: float, *after: int, uses: tuple[tuple[str, float], ...] = ()
    ) -> int:
        tasks.append(Task(queue, seconds + rates.subgroup_s, after, uses))
        return len(tasks) - 1

    for size, place in zip(schedule.sizes, schedule.places, strict=True):
        states, param = STATE_BYTES * size, rates.param_bytes * size
        if place == "resident":
            add("device", size / rates.device_params_per_s)
        elif place == "host":
            # States are read and written, the gradient read, the parameter written.
            uses = ((MEMORY, 2.0 * states + 2 * param),)
            done = add("host", size / rates.host_params_per_s, uses=uses)
            if rates.params_on == "device":
                copy("parameters", up, param, rates.to_device_bytes_per_s, done)
        else:
            along = param if rates.params_on == "host" else 0
            back = along if rates.param_bytes < 4 else 0  # one of fp32 is its own master
            free = gone[-schedule.buffers :][:1] if len(gone) >= schedule.buffers else []
            came = copy("states in", up, states + along, rates.to_device_bytes_per_s, *free)
            done = add("device", size / rates.device_params_per_s, came)
            gone.append(copy("states out", down, states + back, rates.to_host_bytes_per_s, done))
    return tasks


def simulate_updates(schedule: UpdateSchedule, rates: UpdateRates) -> Timeline:
    """Return what happens in the update of one step."""
    shared = dict.fromkeys(("to device", "to host", "link"), 1.0)
    return simulate(tasks_of(schedule, rates), {**shared, MEMORY: rates.host_memory_bytes_per_s})


def plan_updates(
    sizes: Sequence[int], rates: UpdateRates, *, resident: float = 0.0, buffers: int = 2
) -> UpdateSchedule:
    """Return the schedule with the share that takes the least time, as the timeline has it.

    The time over the share has one valley but for steps of single subgroups: each search is four
    times as fine as the one before, around what that has found.
    """
    count = max(1, _at_the_tail(sizes, resident))
    tried: dict[int, float] = {}

    def schedule_of(moved: int) -> UpdateSchedule:
        return share_schedule(sizes, moved / count, resident=resident, buffers=buffers)

    def duration_s(moved: int) -> float:
        if moved not in tried:
            tried[moved] = simulate_updates(schedule_of(moved), rates).duration_s
        return tried[moved]

    step, low, high = max(1, count // 8), 0, count
    while True:
        best = min(
            {*range(low, high + 1, step), high}, key=lambda moved: (duration_s(moved), moved)
        )
        if step == 1:
            return schedule_of(best)
        low, high, step = max(0, best - step), min(count, best + step), max(1, step // 4)
