"""One forward, its backward and the update as an event graph: what runs when, and what is where."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perfmodel.activation_step import (
    activation_step,
    channels_of,
    repeated,
    run_again,
)
from perfmodel.machine import Machine
from perfmodel.memory import Moment, step_bytes
from perfmodel.operator_times import OperatorTimes
from perfmodel.prediction import rank_tape, rank_times, zeroed_s
from perfmodel.schedules.activations import ActivationSchedule
from perfmodel.schedules.trace import Channel
from perfmodel.states import held, held_bytes
from perfmodel.step_trace import StepTrace, step_trace
from perfmodel.tape import Tape
from perfmodel.timeline import Task, Timeline, simulate
from perfmodel.update_step import UpdateStep, update_step
from perfmodel.workload import Strategy, Workload

__all__ = ["Level", "Span", "StepTimeline", "step_timeline"]

DEVICE = "device"
_BOTH_WAYS = "both ways"
_WAYS = {"ssd": ("ssd write", "ssd read"), "host": ("to host", "to device")}


@dataclass(frozen=True)
class Span:
    """What a resource does from one moment to another."""

    resource: str
    what: str
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Level:
    """Memory of the device from a moment on."""

    at_s: float
    always_bytes: int
    """Parameters, gradients, states and buffers."""
    activation_bytes: int = 0
    """Saved tensors that stay, and what operators have in use."""
    moving_bytes: int = 0
    """Saved tensors on their way out, or back before they are used."""

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.always_bytes + self.activation_bytes + self.moving_bytes


@dataclass(frozen=True)
class StepTimeline:
    """One micro-batch and one update; a step may have several of the first."""

    spans: tuple[Span, ...]
    levels: tuple[Level, ...]
    """In the order of time."""
    duration_s: float
    waited_s: float
    """For how long the device had nothing to do before the update."""


def step_timeline(workload: Workload, strategy: Strategy, machine: Machine) -> StepTimeline:
    """Return what a rank does in a forward, its backward and the update behind them.

    The schedules are those that a run executes. Raises ValueError for what the machine does not
    have.
    """
    tape = rank_tape(workload, machine)
    times = rank_times(tape, workload, machine)
    step = activation_step(tape, times, machine, strategy)
    recompute = repeated(tape, strategy)
    found = step_trace(tape, times, strategy.min_tensor_bytes, recompute)
    graph = _Graph(tape, times, found, recompute)
    if step.schedule is None:
        graph.add_step()
    else:
        channel, room = (
            channels_of(machine, strategy.activations),
            strategy.memory_bytes,
        )
        graph.add_step(step.schedule, channel, math.inf if room is None else room)
    computed = graph.simulated()
    update = update_step(workload, strategy, machine)
    memory = _Memory(workload, strategy, machine)
    levels = memory.levels(graph, computed, step.schedule)
    begin_s = computed.duration_s
    early_s = step.backward_s if strategy.early_gradients else 0.0
    after, end_s = _updating(update, zeroed_s(workload, machine), begin_s, early_s)
    levels.append(Level(begin_s, memory.update_bytes))
    busy_s = computed.busy_s(DEVICE)
    return StepTimeline((*graph.spans(computed), *after), tuple(levels), end_s, begin_s - busy_s)


def _updating(
    update: UpdateStep, zeroed: float, begin_s: float, early_s: float
) -> tuple[list[Span], float]:
    """Return for how long each resource is busy with gradients and the update, and when that ends.

    Gradients leave `early_s` before the backward ends. In the update resources wait for each other
    as well: it takes longer than any is busy.
    """
    spans = []
    if zeroed:
        spans.append(Span(DEVICE, "gradients set to nothing", begin_s, begin_s + zeroed))
    sent_s = begin_s - early_s + update.gradients_s
    if update.gradients_s:
        spans.append(Span("to host", "gradients", begin_s - early_s, sent_s))
    begin_s = max(begin_s, sent_s) + zeroed
    for resource, seconds in update.busy_s.items():
        if seconds:
            end_s = begin_s + min(seconds, update.update_s)
            spans.append(Span(resource, "update", begin_s, end_s))
    return spans, begin_s + update.update_s


class _Graph:
    """The tasks of a forward and a backward."""

    def __init__(
        self, tape: Tape, times: OperatorTimes, found: StepTrace, recompute: Sequence[int]
    ) -> None:
        self.tape, self.found = tape, found
        self._times = times
        self._again = {tape.blocks[number][-1]: number for number in recompute}
        self._tasks: list[Task] = []
        self._whats: list[str] = []
        self._rates: dict[str, float] = {}
        self.forward: dict[int, int] = {}
        """The task of each operator's forward."""
        self.backward: dict[int, int] = {}
        self.written: dict[int, int] = {}
        """The task of each tensor's way out."""
        self.read: dict[int, int] = {}

    def simulated(self) -> Timeline:
        """Return when each task runs."""
        return simulate(self._tasks, self._rates)

    def spans(self, ran: Timeline) -> Iterator[Span]:
        """Yield what each resource does; what follows at once and is alike is one."""
        open_spans: dict[str, Span] = {}
        for task, what, begin_s, end_s in zip(
            self._tasks, self._whats, ran.begin_s, ran.end_s, strict=True
        ):
            last = open_spans.get(task.queue)
            if last is not None and last.what == what and begin_s <= last.end_s * (1 + 1e-9):
                begin_s = last.begin_s
            elif last is not None:
                yield last
            open_spans[task.queue] = Span(task.queue, what, begin_s, end_s)
        yield from open_spans.values()

    def add_step(
        self,
        schedule: ActivationSchedule | None = None,
        channel: Channel | None = None,
        room: float = math.inf,
    ) -> None:
        """Add all of it; what a schedule moves goes through `channel`, so that `room` is enough."""
        moved = [] if schedule is None else _moved(schedule)
        if channel is not None and channel.mixed_bytes_per_s < math.inf:
            # What one direction has alone may be more than both have together.
            rates = (getattr(channel, f"{way}_bytes_per_s") for way in ("mixed", "read", "write"))
            self._rates[_BOTH_WAYS] = max(rates)
        self._add_forward({*moved}, channel, room - self.found.small_bytes)
        needed: dict[int, list[int]] = {}
        for index in moved:
            needed.setdefault(self.found.places[index][1], []).append(index)
        reads = sorted(moved, key=lambda index: schedule.read_s[index]) if schedule else []
        for at in reversed(range(len(self.tape.operators))):
            while reads and schedule and channel is not None:
                # Before the next operator begins, so that it ends when it is wanted.
                due = at == 0 or schedule.read_s[reads[0]] < self.found.begin_s[at - 1]
                if not due and reads[0] not in needed.get(at, ()):
                    break
                index = reads.pop(0)
                ready = [self.written[index], self.backward.get(at + 1, self.forward[at])]
                self.read[index] = self._copy(index, channel, 1, *ready)
            self._add_backward(at, [self.read[index] for index in needed.get(at, ())])

    def _add_forward(self, moved: set[int], channel: Channel | None, room: float) -> None:
        """Add the forward, which waits where what is saved has no room until more has left."""
        saved: dict[int, list[int]] = {}
        for index, (first, _) in enumerate(self.found.places):
            saved.setdefault(first, []).append(index)
        leaving: deque[int] = deque()
        held = 0
        for at in range(len(self.tape.operators)):
            mine = saved.get(at, ())
            held += sum(self.found.trace.tensors[index].nbytes for index in mine)
            gone = []
            while held > room and leaving:
                index = leaving.popleft()
                held -= self.found.trace.tensors[index].nbytes
                gone.append(self.written[index])
            self.forward[at] = self._add(DEVICE, self._times.forward_s[at], "forward", *gone)
            for index in (each for each in mine if each in moved):
                assert channel is not None
                self.written[index] = self._copy(index, channel, 0, self.forward[at])
                leaving.append(index)

    def _add_backward(self, at: int, reads: list[int]) -> None:
        if at in self._again:
            block = run_again(self.tape, self._again[at])
            seconds = sum(self._times.forward_s[each] for each in block)
            self._add(DEVICE, seconds, "recompute")
        self.backward[at] = self._add(DEVICE, self._times.backward_s[at], "backward", *reads)

    def _copy(self, index: int, channel: Channel, way: int, *after: int) -> int:
        nbytes = self.found.trace.tensors[index].nbytes
        seconds = channel.read_s(nbytes) if way else channel.write_s(nbytes)
        queue = _WAYS[channel.tier][way]
        uses = ((_BOTH_WAYS, float(nbytes)),) if self._rates else ()
        return self._add(queue, seconds, "activations", *after, uses=uses)

    def _add(
        self,
        queue: str,
        seconds: float,
        what: str,
        *after: int,
        uses: tuple[tuple[str, float], ...] = (),
    ) -> int:
        self._tasks.append(Task(queue, seconds, after, uses if seconds else ()))
        self._whats.append(what)
        return len(self._tasks) - 1


def _moved(schedule: ActivationSchedule) -> list[int]:
    return [index for index, tier in enumerate(schedule.tiers) if tier != "device"]


class _Memory:
    """What a device has in memory over a step."""

    def __init__(self, workload: Workload, strategy: Strategy, machine: Machine) -> None:
        # Without a link what moves goes through staging, which is the device's own memory.
        self._alone = machine.link is None
        items = held(workload, strategy, device_is_host=self._alone)
        self.backward_bytes = held_bytes(items, DEVICE, "backward")
        self.update_bytes = held_bytes(items, DEVICE, "update")
        self._strategy = strategy

    def levels(
        self, graph: _Graph, ran: Timeline, schedule: ActivationSchedule | None
    ) -> list[Level]:
        """Return the memory of forward and backward."""
        tape, found = graph.tape, graph.found
        moved = [] if schedule is None else _moved(schedule)
        gone = {found.storages[index] for index in moved}
        recompute = repeated(tape, self._strategy)
        moments = step_bytes(tape, recompute, leaves=lambda value: value.storage in gone).moments
        changes = [] if self._alone else sorted(_moving(graph, ran, moved))
        points = [(self._begin_s(graph, ran, each), each.nbytes) for each in moments]
        levels: list[Level] = []
        now_s, activations, moving, at = 0.0, 0, 0, 0
        for begin_s, nbytes in points:
            now_s = max(now_s, begin_s)  # what is run again comes when its block is wanted
            while at < len(changes) and changes[at][0] <= now_s:
                moving += changes[at][1]
                levels.append(Level(changes[at][0], self.backward_bytes, activations, moving))
                at += 1
            activations = nbytes
            levels.append(Level(now_s, self.backward_bytes, activations, moving))
        return levels

    @staticmethod
    def _begin_s(graph: _Graph, ran: Timeline, moment: Moment) -> float:
        tasks = graph.backward if moment.backward else graph.forward
        return ran.begin_s[tasks[moment.at]]


def _moving(graph: _Graph, ran: Timeline, moved: Sequence[int]) -> Iterator[tuple[float, int]]:
    """Yield when tensors on their way begin and cease to be on the device."""
    for index in moved:
        nbytes, (first, _) = graph.found.trace.tensors[index].nbytes, graph.found.places[index]
        # While the operator after it runs, it still counts as saved.
        begin_s = ran.end_s[graph.forward[min(first + 1, len(graph.forward) - 1)]]
        end_s = ran.end_s[graph.written[index]]
        if begin_s < end_s:
            yield begin_s, nbytes
            yield end_s, -nbytes
        yield ran.begin_s[graph.read[index]], nbytes
        yield ran.end_s[graph.backward[first]], -nbytes
