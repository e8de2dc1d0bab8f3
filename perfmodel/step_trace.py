"""The trace of a step that has not run: when its tape's tensors are saved and wanted again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate

from perfmodel.memory import entering
from perfmodel.operator_times import OperatorTimes
from perfmodel.schedules.blocks import Block
from perfmodel.schedules.trace import SavedTensor, Trace
from perfmodel.tape import Tape, Value

__all__ = ["StepTrace", "step_trace"]


@dataclass(frozen=True)
class StepTrace:
    """A forward and its backward as the schedules take it."""

    trace: Trace
    blocks: tuple[Block, ...]
    small_bytes: int
    """Of saved tensors too small to stand in the trace."""
    duration_s: float
    storages: tuple[Value, ...]
    """Whose bytes the tensors of the trace are."""
    places: tuple[tuple[int, int], ...]
    """The first and the last operator that save each of them."""
    begin_s: tuple[float, ...]
    """When each operator's backward begins."""


def step_trace(
    tape: Tape, times: OperatorTimes, min_tensor_bytes: int = 0, recompute: Collection[int] = ()
) -> StepTrace:
    """Return what `tape` saves, on a clock on which its operators take `times`.

    A tensor may leave once the operator after the one that saves it has begun. The blocks with the
    numbers in `recompute` save what enters them, and run again before their backward.
    """
    again = {number: tape.blocks[number] for number in recompute}
    forward_end_s = [*accumulate(times.forward_s)]
    forward_s = forward_end_s[-1] if forward_end_s else 0.0
    backward_s = list(times.backward_s)
    for block in again.values():
        backward_s[block[-1]] += sum(times.forward_s[at] for at in block)
    # When the backward of each begins and ends.
    ends = [*accumulate(reversed(backward_s), initial=forward_s)]
    begin_s, end_s = ends[-2::-1], ends[:0:-1]
    savers = _savers(tape, again.values())
    large = {
        storage: places for storage, places in savers.items() if storage.nbytes >= min_tensor_bytes
    }
    number = {storage: index for index, storage in enumerate(large)}
    tensors = [
        SavedTensor(
            storage.nbytes,
            forward_end_s[min(places)],
            begin_s[max(places)],
            end_s[min(places)],
        )
        for storage, places in large.items()
    ]
    blocks = tuple(_block(tape, times, block, savers, number) for block in tape.blocks)
    small_bytes = sum(storage.nbytes for storage in savers.keys() - large.keys())
    return StepTrace(
        Trace(tuple(tensors)),
        blocks,
        small_bytes,
        ends[-1],
        tuple(large),
        tuple((min(places), max(places)) for places in large.values()),
        tuple(begin_s),
    )


def _savers(tape: Tape, again: Collection[range]) -> dict[Value, list[int]]:
    """Return the operators that save each storage; for those of a block, both of its ends."""
    savers: dict[Value, list[int]] = {}
    repeated = {at: block for block in again for at in block}
    for at, operator in enumerate(tape.operators):
        block = repeated.get(at)
        if block is None:
            for value in operator.saves:
                savers.setdefault(value.storage, []).append(at)
        elif at == block[0]:
            for storage in entering(tape, block):
                savers.setdefault(storage, []).extend((block[0], block[-1]))
    for value in tape.inputs:
        savers.pop(value.storage, None)
    return savers


def _block(
    tape: Tape,
    times: OperatorTimes,
    block: range,
    savers: dict[Value, list[int]],
    number: dict[Value, int],
) -> Block:
    """Return a block of operators as the schedules take it."""
    mine = [storage for storage, places in savers.items() if places[0] in block]
    numbers = [number[storage] for storage in mine if storage in number]
    enters = (number[storage] for storage in entering(tape, block) if storage in number)
    return Block(
        sum(times.forward_s[at] for at in block),
        range(min(numbers), max(numbers) + 1) if numbers else range(0),
        tuple(enters),
        sum(storage.nbytes for storage in mine if storage not in number),
    )
