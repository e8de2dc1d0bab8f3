"""A step of a whole pipeline as one event graph, with activations kept or moved to each rank's SSD.

Every rank does its passes in the order of Megatron's schedules (`schedules.pipeline`), waits for
its neighbours, and moves what its forwards leave as `offload.integrations.pipeline` has it: of a
forward that its own backward follows nothing leaves; reading for a backward begins when the
backward before it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from perfmodel.cluster import StageCosts, needed_bytes_per_s
from perfmodel.machine import Machine
from perfmodel.schedules.pipeline import Pass, passes_of
from perfmodel.timeline import Task, Timeline, simulate
from perfmodel.workload import Workload

__all__ = ["ChunkCosts", "PipelineStep", "chunk_costs", "pipeline_step"]

_PIECES = 4
_LEAVING = 2
DRIVE_LOAD = 0.75
"""Of what a drive takes and gives back while a micro-batch is computed, the part that is moved:
passes of a pipeline come unevenly, and with all of it backwards wait."""


@dataclass(frozen=True, kw_only=True)
class ChunkCosts:
    """What one micro-batch takes of one of a rank's model chunks."""

    forward_s: float
    backward_s: float
    saved_bytes: float = 0.0
    """What a forward leaves for its backward."""
    moved_bytes: float = 0.0
    """Of those, what leaves the device."""
    write_s: float = 0.0
    """Of those, alone on their way."""
    read_s: float = 0.0
    pieces: int = _PIECES
    """A chunk is computed and moved in so many parts, one after the other."""


@dataclass(frozen=True, kw_only=True)
class PipelineStep:
    """What one step of all ranks comes to, without the update."""

    duration_s: float
    bubble_share: float
    """What the rank that computes most waits, over what it computes."""
    waited_s: float
    """By how much moving activations makes it longer: waiting for room, and for what is read."""
    device_bytes: tuple[float, ...]
    """Of each rank, the most saved activations on the device at once."""
    written_bytes: tuple[float, ...]
    """Of each rank, what went to its SSD, and came back."""
    write_bytes_per_s: float
    """What the SSD of the rank that moves most must take: all of it over half of the step."""


def chunk_costs(
    workload: Workload, machine: Machine, *, recompute: bool = False, moves: bool = False
) -> list[list[ChunkCosts]]:
    """Return what each of a pipeline's ranks, and each of its chunks, takes for a micro-batch.

    The last chunk of the last rank has the head. `moves`: what layers save goes to the rank's part
    of the drive, as much of it as `DRIVE_LOAD` allows (SSDTrain moves what its drive keeps up
    with). Raises ValueError for a machine without a drive, and as `simulate_cluster`.
    """
    parallel, costs = workload.parallel, StageCosts(workload, machine, recompute)
    saved = costs.layers_saved_bytes / parallel.chunks
    chunk = ChunkCosts(
        forward_s=costs.forward_s / parallel.chunks,
        backward_s=costs.backward_s / parallel.chunks,
        saved_bytes=saved,
    )
    if moves:
        drive = machine.drive
        if drive is None:
            raise ValueError(f"{machine.name!r} has no drive for activations; add one to it")
        read_s, write_s, both_s = (
            saved * machine.devices / rate
            for rate in (
                drive.read_bytes_per_s,
                drive.write_bytes_per_s,
                drive.mixed_bytes_per_s / 2,
            )
        )
        free_s = DRIVE_LOAD * (chunk.forward_s + chunk.backward_s)
        share = min(1.0, free_s / max(read_s, write_s, both_s))
        chunk = replace(
            chunk,
            moved_bytes=share * saved,
            write_s=share * max(write_s, both_s / 2),
            read_s=share * max(read_s, both_s / 2),
        )
    found = [[chunk] * parallel.chunks for _ in range(parallel.pipeline)]
    found[-1][-1] = replace(
        chunk,
        forward_s=chunk.forward_s + costs.head_forward_s,
        backward_s=chunk.backward_s + costs.head_backward_s,
        saved_bytes=saved + costs.around_saved_bytes,
    )
    return found


def pipeline_step(
    costs: Sequence[Sequence[ChunkCosts]],
    micro_batches: int,
    *,
    sent_s: float = 0.0,
    group: int | None = None,
    leaving: int = _LEAVING,
) -> PipelineStep:
    """Return what a step of ranks with these chunks takes.

    `sent_s`: from one stage to the next, while others compute. `leaving`: a piece of a forward
    begins when no more than so many before it are still being written, which is what holds a rank's
    memory. Raises ValueError for numbers that no pipeline has.
    """
    graph = _Graph(costs, micro_batches, sent_s, group, leaving)
    done = simulate(graph.tasks)
    kept = done
    if any(each.moved_bytes for chunks in costs for each in chunks):
        stays = [[replace(each, moved_bytes=0.0) for each in chunks] for chunks in costs]
        kept = simulate(_Graph(stays, micro_batches, sent_s, group, leaving).tasks)
    ranks = range(len(costs))
    busiest_s = max(done.busy_s(_device(rank)) for rank in ranks)
    written = tuple(graph.written_bytes(rank) for rank in ranks)
    return PipelineStep(
        duration_s=done.duration_s,
        bubble_share=done.duration_s / busiest_s - 1,
        waited_s=done.duration_s - kept.duration_s,
        device_bytes=tuple(graph.most_bytes(done, rank) for rank in ranks),
        written_bytes=written,
        write_bytes_per_s=needed_bytes_per_s(max(written), done.duration_s),
    )


_Key = tuple[int, int, int]
"""A rank, one of its chunks and a micro-batch."""


def _device(rank: int) -> str:
    return f"{rank} device"


@dataclass
class _Graph:
    """The tasks of all ranks, each listed behind those it waits for."""

    costs: Sequence[Sequence[ChunkCosts]]
    micro_batches: int
    sent_s: float
    group: int | None
    leaving: int
    tasks: list[Task] = field(default_factory=list)
    forward: dict[_Key, list[int]] = field(default_factory=dict)
    """The tasks of its pieces."""
    arrived: dict[tuple[bool, _Key], int] = field(default_factory=dict)
    """What brings a pass its input: the forward before it, or the gradient behind it."""
    wrote: dict[_Key, list[int]] = field(default_factory=dict)
    read: dict[_Key, list[int]] = field(default_factory=dict)
    """Of its pieces, the last one first."""
    backward: dict[_Key, list[int]] = field(default_factory=dict)
    """Likewise."""
    under_way: dict[int, list[int]] = field(default_factory=dict)
    """What each rank writes, in its order."""

    def __post_init__(self) -> None:
        ranks = [self._passes(rank) for rank in range(len(self.costs))]
        at = [0] * len(ranks)
        while any(place < len(passes) for place, passes in zip(at, ranks, strict=True)):
            before = len(self.tasks)
            for rank, passes in enumerate(ranks):
                while at[rank] < len(passes) and self._can(rank, passes[at[rank]]):
                    self._add(rank, passes, at[rank])
                    at[rank] += 1
            assert len(self.tasks) > before, "a schedule in which everyone waits"

    def _passes(self, rank: int) -> list[Pass]:
        return passes_of(
            stages=len(self.costs),
            rank=rank,
            micro_batches=self.micro_batches,
            chunks=len(self.costs[rank]),
            group=self.group,
        )

    def _needs(self, rank: int, each: Pass) -> tuple[bool, _Key] | None:
        """Return what a pass has to have arrived; None at the ends of the model."""
        key = rank, each.chunk, each.micro_batch
        at_end = (
            (rank, each.chunk) == (0, 0)
            if each.is_forward
            else (rank, each.chunk) == (len(self.costs) - 1, len(self.costs[rank]) - 1)
        )
        return None if at_end else (each.is_forward, key)

    def _can(self, rank: int, each: Pass) -> bool:
        needed = self._needs(rank, each)
        return needed is None or needed in self.arrived

    def _task(self, queue: str, seconds: float, *after: int | None) -> int:
        known = tuple(number for number in after if number is not None)
        self.tasks.append(Task(queue, seconds, after=known))
        return len(self.tasks) - 1

    def _add(self, rank: int, passes: Sequence[Pass], at: int) -> None:
        each = passes[at]
        needed = self._needs(rank, each)
        arrived = None if needed is None else self.arrived[needed]
        if each.is_forward:
            following = passes[at + 1] if at + 1 < len(passes) else None
            self._add_forward(rank, each, arrived, following)
        else:
            behind = next((found for found in passes[at + 1 :] if not found.is_forward), None)
            self._add_backward(rank, each, arrived, behind)

    def _add_forward(
        self, rank: int, each: Pass, arrived: int | None, following: Pass | None
    ) -> None:
        key, costs = (rank, each.chunk, each.micro_batch), self.costs[rank][each.chunk]
        own = Pass(False, each.chunk, each.micro_batch)
        stays = not costs.moved_bytes or (following == own and len(self.costs) > 1)
        written, under_way = self.wrote.setdefault(key, []), self.under_way.setdefault(rank, [])
        pieces = self.forward.setdefault(key, [])
        for _ in range(costs.pieces):
            room = under_way[-self.leaving] if len(under_way) >= self.leaving else None
            pieces.append(self._task(_device(rank), costs.forward_s / costs.pieces, arrived, room))
            if not stays:
                seconds = costs.write_s / costs.pieces
                written.append(self._task(f"{rank} write", seconds, pieces[-1]))
                under_way.append(written[-1])
        if following is not None and not following.is_forward:
            self._add_reads((rank, following.chunk, following.micro_batch), pieces[-1])
        self._send(rank, each, pieces[-1])

    def _add_backward(
        self, rank: int, each: Pass, arrived: int | None, behind: Pass | None
    ) -> None:
        key, costs = (rank, each.chunk, each.micro_batch), self.costs[rank][each.chunk]
        begun = self._task(_device(rank), 0.0, arrived)
        self._add_reads(key, begun)
        if behind is not None:
            self._add_reads((rank, behind.chunk, behind.micro_batch), begun)
        there: list[int | None] = [*self.read[key]] or [None] * costs.pieces
        pieces = self.backward.setdefault(key, [])
        for read in there:
            seconds = costs.backward_s / costs.pieces
            pieces.append(self._task(_device(rank), seconds, begun, read))
        self._send(rank, each, pieces[-1])

    def _add_reads(self, key: _Key, told: int) -> None:
        """Have a forward's activations come back, once it is known that its backward is next."""
        if key not in self.wrote or key in self.read:
            return
        rank, chunk, _ = key
        costs = self.costs[rank][chunk]
        self.read[key] = [
            self._task(f"{rank} read", costs.read_s / costs.pieces, told, written)
            for written in reversed(self.wrote[key])
        ]

    def _send(self, rank: int, each: Pass, ended: int) -> None:
        """Have the next stage, or the one before, get what a pass gives."""
        step = 1 if each.is_forward else -1
        other, chunk = (rank + step) % len(self.costs), each.chunk
        if not 0 <= rank + step < len(self.costs):
            chunk += step
        if 0 <= chunk < len(self.costs[rank]):
            if self.sent_s:
                ended = self._task(f"{rank} to {other}", self.sent_s, ended)
            self.arrived[each.is_forward, (other, chunk, each.micro_batch)] = ended

    def written_bytes(self, rank: int) -> float:
        """Return what a rank's forwards send away."""
        return sum(
            self.costs[rank][key[1]].moved_bytes
            for key, written in self.wrote.items()
            if written and key[0] == rank
        )

    def most_bytes(self, done: Timeline, rank: int) -> float:
        """Return the most that a rank's forwards have on the device at once."""
        changes: list[tuple[float, int, float]] = []

        def there(begin_s: float, end_s: float, nbytes: float) -> None:
            # What goes at a moment makes room for what comes then.
            changes.extend([(begin_s, 1, nbytes), (end_s, 0, -nbytes)])

        for key in (key for key in self.forward if key[0] == rank):
            costs, written = self.costs[rank][key[1]], self.wrote[key]
            moved = costs.moved_bytes if written else 0.0
            begun = [done.begin_s[number] for number in self.forward[key]]
            ended = [done.end_s[number] for number in reversed(self.backward[key])]
            read = [done.begin_s[number] for number in reversed(self.read[key])]
            for piece, (begin_s, end_s) in enumerate(zip(begun, ended, strict=True)):
                there(begin_s, end_s, (costs.saved_bytes - moved) / costs.pieces)
                if written:
                    there(begin_s, done.end_s[written[piece]], moved / costs.pieces)
                    there(read[piece], end_s, moved / costs.pieces)
        return max(accumulate(nbytes for _, _, nbytes in sorted(changes)), default=0.0)
