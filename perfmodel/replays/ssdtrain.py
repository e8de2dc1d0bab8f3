"""SSDTrain's nine cases: how much less memory activations take at their worst.

BERT, GPT and T5 in three sizes on two GPUs that share each map, sequences of 1024, 16 at once, pure
half precision (DAC 2025, section IV). What one GPU does is taken down as a model with half as many
heads, channels of perceptrons and tokens of the table; all-reduces between the two are left out,
which take about a hundredth of these steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from perfmodel.layers import CUDA, Shape, tape_of
from perfmodel.machine import Device, read_machine
from perfmodel.memory import Moment, step_bytes
from perfmodel.model import Model
from perfmodel.operator_times import operator_times
from perfmodel.schedules.activations import plan_activations
from perfmodel.schedules.prefix_cut import prefix_cut
from perfmodel.schedules.replay import KEPT, Replay
from perfmodel.schedules.trace import Channel, Limits, SavedTensor, Trace
from perfmodel.tape import Operator, Tape, Value

__all__ = ["CASES", "PUBLISHED_REDUCTION", "REACHED_BYTES_PER_S", "Case", "Reduction", "reduction"]

PUBLISHED_REDUCTION = (0.28, 0.47)
"""Of the peak of activations: 28 to 40 % in the table of the nine, 47 % in the abstract."""
REACHED_BYTES_PER_S = 10e9
"""What its authors say that their writes came to, in the commit that made them faster; the data
sheets of the four drives would have it be 24.4 GB/s."""

SEQ_LEN, MICRO_BATCH, DTYPE = 1024, 16, "float16"
TENSOR, HEAD_SIZE = 2, 128
MIN_TENSOR_BYTES = 1 << 20
# Those of Megatron's scripts, up to the next multiple of 128 a rank.
VOCABULARY = {"bert": 30720, "gpt": 50432, "t5": 30720}


@dataclass(frozen=True)
class Case:
    """A kind of model, its hidden channels and its layers; T5's decoder has the lesser half."""

    kind: str
    hidden: int
    layers: int

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.kind} {self.hidden}x{self.layers}"

    def model(self, tensor: int = TENSOR) -> Model:
        """Return what one of `tensor` ranks has."""
        decoder = self.layers // 2 if self.kind == "t5" else self.layers
        return Model(
            num_layers=decoder,
            encoder_layers=self.layers - decoder,
            hidden_size=self.hidden,
            num_heads=self.hidden // HEAD_SIZE // tensor,
            head_size=HEAD_SIZE,
            ffn_size=4 * self.hidden // tensor,
            vocab_size=VOCABULARY[self.kind] // tensor,
            max_positions=SEQ_LEN,
            causal=self.kind != "bert",
            dropout=0.1,
        )


CASES = tuple(
    Case(kind, hidden, layers)
    for kind in ("bert", "gpt", "t5")
    for hidden, layers in ((8192, 4), (12288, 3), (16384, 2))
)


@dataclass(frozen=True)
class Reduction:
    """What leaves of one case's activations, and what is left at the worst moment."""

    case: Case
    kept_peak_bytes: int
    """Of all tensors of a step, parameters and their gradients at rest left out."""
    peak_bytes: int
    moved_bytes: int
    step_s: float

    @property
    def reduction(self) -> float:
        """The part of the peak that there is no longer."""
        return 1 - self.peak_bytes / self.kept_peak_bytes

    @property
    def write_bytes_per_s(self) -> float:
        """What SSDTrain calls required: what leaves over half of the step."""
        return self.moved_bytes / (self.step_s / 2)


def reduction(
    case: Case, write_bytes_per_s: float = REACHED_BYTES_PER_S, *, best: bool = False
) -> Reduction:
    """Return what offloading does to a case's peak: by SSDTrain's rules, or the best schedule.

    Its rules: a prefix of the step leaves (`prefix_cut`), and the last layer and what comes behind
    it stay.
    """
    machine = read_machine("ssdtrain")
    shape = Shape(batch=MICRO_BATCH, seq_len=SEQ_LEN, element_bytes=2, kernels=CUDA)
    paced = _Paced(tape_of(case.model(), shape), machine.device)
    drive = machine.drive
    assert drive is not None
    channel = Channel(
        tier="ssd",
        write_bytes_per_s=write_bytes_per_s,
        read_bytes_per_s=drive.read_bytes_per_s,
    )
    limits = Limits(min_tensor_bytes=MIN_TENSOR_BYTES)
    trace = paced.trace
    replay = Replay(trace, [channel], limits)
    if best:
        tiers = plan_activations(trace, [channel], limits).tiers
        choice = [KEPT if tier == "device" else 0 for tier in tiers]
    else:
        choice = [
            option if tensor.saved_s <= paced.last_layer_s and movable else KEPT
            for option, tensor, movable in zip(
                prefix_cut(trace, channel), trace.tensors, replay.movable, strict=True
            )
        ]
    outcome = replay.run(choice)
    while outcome.broken >= 0:  # not written when it is wanted again: it never left
        choice[outcome.broken] = KEPT
        outcome = replay.run(choice)
    return Reduction(
        case,
        kept_peak_bytes=paced.peak_bytes([math.inf] * len(choice), [math.inf] * len(choice)),
        peak_bytes=paced.peak_bytes(outcome.written_s, outcome.read_s),
        moved_bytes=outcome.moved_bytes,
        step_s=paced.step_s,
    )


class _Paced:
    """A tape with the times of its operators, and all bytes that are in use meanwhile."""

    def __init__(self, tape: Tape, device: Device) -> None:
        operators = tape.operators
        times = operator_times(operators, device, DTYPE)
        edges = [0.0]
        for seconds in (*times.forward_s, *reversed(times.backward_s)):
            edges.append(edges[-1] + seconds)
        spans = list(pairwise(edges))
        self.step_s = edges[-1]
        self.last_layer_s = edges[tape.blocks[-1].start]
        self._ahead, self._back = spans[: len(operators)], spans[: len(operators) - 1 : -1]
        self._moments = [*self._timed(operators, step_bytes(tape).moments)]
        self.trace = self._trace(tape)

    def _trace(self, tape: Tape) -> Trace:
        savers: dict[Value, list[int]] = {}
        for at, operator in enumerate(tape.operators):
            for storage in {value.storage for value in operator.saves} - {*tape.inputs}:
                savers.setdefault(storage, []).append(at)
        tensors = [
            SavedTensor(
                storage.nbytes,
                self._ahead[where[0]][1],
                self._back[where[-1]][0],
                self._back[where[0]][1],
            )
            for storage, where in savers.items()
        ]
        return Trace(tuple(sorted(tensors, key=lambda tensor: tensor.saved_s)))

    def _timed(
        self, operators: Sequence[Operator], moments: Sequence[Moment]
    ) -> Iterator[tuple[Moment, tuple[float, float]]]:
        """Give each moment its time: one of each forward, and of backwards that do anything."""
        yield from zip(moments, self._ahead, strict=False)
        left = list(reversed(moments[len(operators) :]))
        for at in reversed(range(len(operators))):
            if left and operators[at].writes and left[-1].operator == operators[at].name:
                yield left.pop(), self._back[at]
        if left:
            raise RuntimeError(f"{len(left)} moments of a backward have no operator")

    def peak_bytes(self, written_s: Sequence[float], read_s: Sequence[float]) -> int:
        """Return the most that is in use while each tensor is away between two moments."""
        sizes = [tensor.nbytes for tensor in self.trace.tensors]
        peak = 0
        for moment, (begin_s, end_s) in self._moments:
            away = sum(
                nbytes
                for nbytes, gone_s, back_s in zip(sizes, written_s, read_s, strict=True)
                if gone_s <= begin_s and end_s <= back_s
            )
            peak = max(peak, moment.nbytes - away)
        return peak
