"""What a step's tasks do to each other: when each begins and ends, and how busy everything was.

Each queue (a processor, a stream of copies, a drive) does one task at a time, in the order in which
they are listed. Tasks of several queues may use the same thing at once, a direction of a link or
the host's memory; then they share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Task", "Timeline", "simulate"]

# What is left of a sum of steps is not always exactly nothing.
_NOTHING = 1e-12


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work for one queue."""

    queue: str
    seconds: float
    """How long it takes when nothing else goes on."""
    after: tuple[int, ...] = ()
    """Tasks listed earlier, by number, that must have ended."""
    uses: tuple[tuple[str, float], ...] = ()
    """How much of what is shared it takes in all: bytes, or seconds of a link."""


@dataclass(frozen=True)
class Timeline:
    """When each task ran. Times are seconds from the first one's begin."""

    tasks: tuple[Task, ...]
    begin_s: tuple[float, ...]
    end_s: tuple[float, ...]

    @property
    def duration_s(self) -> float:
        """How long all of them took together."""
        return max(self.end_s, default=0.0)

    def busy_s(self, queue: str) -> float:
        """Return for how long a queue had a task."""
        spans = zip(self.tasks, self.begin_s, self.end_s, strict=True)
        return sum(end_s - begin_s for task, begin_s, end_s in spans if task.queue == queue)

    def used(self, what: str) -> float:
        """Return how much of something shared was taken in all."""
        return sum(amount for task in self.tasks for name, amount in task.uses if name == what)


def simulate(tasks: Sequence[Task], per_s: Mapping[str, float] | None = None) -> Timeline:
    """Run `tasks` as early as their queues and those before them allow.

    `per_s`: how much of what is shared there is in a second; where more is wanted, all that want it
    are slowed down alike. Raises ValueError for a task that waits for one not listed before it,
    whose seconds are negative or infinite, or that uses something in no time.
    """
    for number, task in enumerate(tasks):
        _check(number, task)
    waiting: dict[str, list[int]] = {}
    for number in reversed(range(len(tasks))):
        waiting.setdefault(tasks[number].queue, []).append(number)
    begin_s, end_s = [math.nan] * len(tasks), [math.inf] * len(tasks)
    left: dict[int, float] = {}  # seconds of those that run, at full speed
    now_s, idle = 0.0, set(waiting)
    while True:
        for queue in sorted(idle):
            if waiting[queue] and all(
                end_s[other] <= now_s for other in tasks[waiting[queue][-1]].after
            ):
                number = waiting[queue].pop()
                begin_s[number], left[number] = now_s, tasks[number].seconds
                idle.discard(queue)
        if not left:
            return Timeline(tuple(tasks), tuple(begin_s), tuple(end_s))
        speed = _speeds([(number, tasks[number]) for number in left], per_s or {})
        step_s = min(seconds / speed[number] for number, seconds in left.items())
        now_s += step_s
        for number in [*left]:
            left[number] -= step_s * speed[number]
            if left[number] <= _NOTHING * tasks[number].seconds:
                del left[number]
                end_s[number] = now_s
                idle.add(tasks[number].queue)


def _check(number: int, task: Task) -> None:
    if not 0 <= task.seconds < math.inf or (task.uses and not task.seconds):
        raise ValueError(f"task {number} cannot take {task.seconds} s: {task}")
    if any(not 0 <= other < number for other in task.after):
        raise ValueError(f"task {number} must wait for tasks before it: {task}")


def _speeds(running: Sequence[tuple[int, Task]], per_s: Mapping[str, float]) -> dict[int, float]:
    wanted: dict[str, float] = {}
    for _, task in running:
        for name, amount in task.uses:
            wanted[name] = wanted.get(name, 0.0) + amount / task.seconds
    slowed = {
        name: min(1.0, per_s.get(name, math.inf) / rate) if rate else 1.0
        for name, rate in wanted.items()
    }
    return {
        number: min((slowed[name] for name, _ in task.uses), default=1.0)
        for number, task in running
    }
