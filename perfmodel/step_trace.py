"""The trace of a step that has not run: when its tape's tensors are saved and wanted again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

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


def step_trace(tape: Tape, times: OperatorTimes, min_tensor_bytes: int = 0) -> StepTrace:
    """Return what `tape` saves, on a clock on which its operators take `times`.

    A tensor may leave once the operator after the one that saves it has begun.
    """
    forward_end_s = [*accumulate(times.forward_s)]
    forward_s = forward_end_s[-1] if forward_end_s else 0.0
    # When the backward of each begins and ends.
    ends = [*accumulate(reversed(times.backward_s), initial=forward_s)]
    begin_s, end_s = ends[-2::-1], ends[:0:-1]
    savers: dict[Value, list[int]] = {}
    for at, operator in enumerate(tape.operators):
        for value in operator.saves:
            savers.setdefault(value.storage, []).append(at)
    for value in tape.inputs:
        savers.pop(value.storage, None)
    large = {
        storage: places for storage, places in savers.items() if storage.nbytes >= min_tensor_bytes
    }
    number = {storage: index for index, storage in enumerate(large)}
    tensors = [
        SavedTensor(storage.nbytes, forward_end_s[places[0]], begin_s[places[-1]], end_s[places[0]])
        for storage, places in large.items()
    ]
    blocks = tuple(_block(tape, times, block, savers, number) for block in tape.blocks)
    small_bytes = sum(storage.nbytes for storage in savers.keys() - large.keys())
    return StepTrace(Trace(tuple(tensors)), blocks, small_bytes, ends[-1])


def _block(
    tape: Tape,
    times: OperatorTimes,
    block: range,
    savers: dict[Value, list[int]],
    number: dict[Value, int],
) -> Block:
    """Return a block of operators as the schedules take it."""
    mine = [storage for storage, places in savers.items() if places[0] in block]
    made = {value.storage for at in block for value in tape.operators[at].writes}
    numbers = [number[storage] for storage in mine if storage in number]
    reads = (value.storage for at in block for value in tape.operators[at].reads)
    enters = dict.fromkeys(number[each] for each in reads if each not in made and each in number)
    return Block(
        sum(times.forward_s[at] for at in block),
        range(min(numbers), max(numbers) + 1) if numbers else range(0),
        tuple(enters),
        sum(storage.nbytes for storage in mine if storage not in number),
    )
