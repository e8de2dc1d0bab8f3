"""A step on many devices: how long it takes, and what its activations ask of their drives.

By sums, not by a timeline: each stage of the pipeline takes as long as the slowest, tensors' and
stages' messages are waited for, gradients are reduced behind the last backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from perfmodel.endurance import DAY_S, life_days
from perfmodel.layers import MEGATRON, Shape, tape_of
from perfmodel.machine import Drive, Machine
from perfmodel.model import Model
from perfmodel.network import network_rate, sent_s
from perfmodel.operator_times import operator_times
from perfmodel.tape import Tape, Value
from perfmodel.workload import Parallel, Workload

__all__ = [
    "ClusterStep",
    "StageCosts",
    "accumulation_of",
    "bubble_share",
    "forwards_under_way",
    "needed_bytes_per_s",
    "rank_model",
    "simulate_cluster",
]

_UPDATE_BYTES = 28
# Layers' outputs are summed over the ranks behind attention and behind the perceptron.
_SUMS = 2


@dataclass(frozen=True, kw_only=True)
class ClusterStep:
    """What one step of all devices comes to."""

    step_s: float
    bubble_share: float
    """What the pipeline's first and last stages wait, over what they compute."""
    tokens_per_s: float
    flops_per_s: float
    """Of products of matrices, on each device; what is run again counts."""
    activation_bytes: float
    """What the device with the head saves in a step, all micro-batches together."""
    in_flight_bytes: float
    """The most of that at once where nothing leaves."""
    write_bytes_per_s: float
    """What a device's drive must take so that all of it leaves: over half of the step."""
    life_days: float | None
    """Of the drive under that; None: there is none, or nobody knows what it is rated for."""


def bubble_share(pipeline: int, micro_batches: int, chunks: int = 1) -> float:
    """Return what a stage waits over what it computes: (p - 1) / (m v).

    One forward and one backward in turns, `chunks` parts of the layers on each rank (Narayanan et
    al. 2021, section 2.2). Raises ValueError for fewer than one of anything.
    """
    for key, value in (
        ("pipeline", pipeline),
        ("micro_batches", micro_batches),
        ("chunks", chunks),
    ):
        if value < 1:
            raise ValueError(f"{key}={value} is not at least 1")
    return (pipeline - 1) / (micro_batches * chunks)


def needed_bytes_per_s(activation_bytes: float, step_s: float) -> float:
    """Return what must be written a second: all within half of the step (SSDTrain, III-D)."""
    if not step_s > 0:
        raise ValueError(f"step_s={step_s!r} is no time in which anything can be written")
    return activation_bytes / (step_s / 2)


def accumulation_of(global_batch: int, micro_batch: int, data: int) -> int:
    """Return the forwards of a step on each rank. Raises ValueError where sequences are left."""
    if global_batch < 1 or global_batch % (micro_batch * data):
        raise ValueError(
            f"global_batch={global_batch} is not a multiple of micro_batch={micro_batch} "
            f"on data={data} ranks"
        )
    return global_batch // (micro_batch * data)


def forwards_under_way(parallel: Parallel, micro_batches: int) -> tuple[float, float]:
    """Return how many micro-batches the first and the last stage have under way at once, at most.

    The first has one for each stage, and where chunks interleave 1 + (p - 1) / (p v) times as many
    (Korthikanti et al. 2022, section 4.2.3). The last has one; of chunks, 1 / v of a forward each,
    it has (v - 1) p before the one that its first backward is of, as Megatron-LM interleaves them.
    """
    stages, chunks = parallel.pipeline, parallel.chunks
    first, last = float(stages), 1 + (chunks - 1) * (stages - 1) / chunks
    if chunks > 1:
        first += (stages - 1) / chunks
    return min(micro_batches, first), min(micro_batches, last)


def rank_model(model: Model, tensor: int) -> Model:
    """Return what one of `tensor` ranks that share each map has, as a model of its own."""
    return replace(
        model,
        num_heads=model.num_heads // tensor,
        num_kv_heads=max(1, model.num_kv_heads // tensor),
        ffn_size=model.ffn_size // tensor,
        vocab_size=-(-model.vocab_size // tensor),
    )


def simulate_cluster(
    workload: Workload,
    machine: Machine,
    *,
    recompute: bool = False,
    rated_amplification: float = 1.0,
) -> ClusterStep:
    """Return what a step of `workload` takes on as many of `machine` as its ranks need.

    `recompute`: layers are run again, and save only what enters them. `rated_amplification`: as for
    `life_days`. Raises ValueError for ranks along the sequence, and for what `tape_of` does not
    know.
    """
    parallel = workload.parallel
    if parallel.context > 1:
        raise ValueError(f"context={parallel.context} is not simulated; at most 1")
    costs = StageCosts(workload, machine, recompute)
    micro_batches = workload.accumulation
    share = bubble_share(parallel.pipeline, micro_batches, parallel.chunks)
    step_s = micro_batches * costs.stage_s * (1 + share) + costs.gradients_s + costs.update_s
    layers, around = costs.layers_saved_bytes, costs.around_saved_bytes
    activation_bytes = (layers + around) * micro_batches
    first, last = forwards_under_way(parallel, micro_batches)
    return ClusterStep(
        step_s=step_s,
        bubble_share=share,
        tokens_per_s=workload.tokens / step_s,
        flops_per_s=costs.stage_flops * micro_batches / step_s,
        activation_bytes=activation_bytes,
        in_flight_bytes=max(layers * last + around, layers * first),
        write_bytes_per_s=needed_bytes_per_s(activation_bytes, step_s),
        life_days=_life_days(
            activation_bytes / step_s * DAY_S, machine.drive, machine.devices, rated_amplification
        ),
    )


def _life_days(
    bytes_per_day: float, drive: Drive | None, devices: int, amplification: float
) -> float | None:
    if drive is None or not drive.rated_bytes:
        return None
    rated = drive.rated_bytes / devices
    return life_days(bytes_per_day, rated, rated_amplification=amplification)


class StageCosts:
    """Of one device: seconds and bytes of a micro-batch on its stage, and of what follows all."""

    def __init__(self, workload: Workload, machine: Machine, recompute: bool) -> None:
        self._workload, self._machine = workload, machine
        parallel, model = workload.parallel, workload.model
        tape = self._tape(rank_model(model, parallel.tensor))
        inside = [
            each for block in tape.blocks for each in tape.operators[block.start : block.stop]
        ]
        layers = len(tape.blocks)
        device, dtype = machine.device, workload.dtype
        whole = operator_times(tape.operators, device, dtype)
        times = operator_times(inside, device, dtype)
        ahead_s, back_s = sum(times.forward_s), sum(times.backward_s)
        runs = 2 if recompute else 1
        # The slowest stage has the head; embeddings cost next to nothing.
        self.head_forward_s = sum(whole.forward_s) - ahead_s
        self.head_backward_s = sum(whole.backward_s) - back_s
        part, sum_s = 1 / parallel.pipeline, layers * _SUMS * self._summed_s(parallel)
        self.forward_s = part * (ahead_s + sum_s)
        self.backward_s = part * ((runs - 1) * ahead_s + back_s + runs * sum_s)
        compute_s = self.forward_s + self.backward_s + self.head_forward_s + self.head_backward_s
        self.stage_s = max(compute_s, self._gathered_s(1 + runs)) + sent_s(workload, machine)
        flops = sum(each.matmul_flops for each in inside)
        head = sum(each.matmul_flops for each in tape.operators) - flops
        self.stage_flops = part * (flops * (2 + runs) + 3 * head)
        self.layers_saved_bytes, self.around_saved_bytes = self._saved(tape, recompute)
        self.gradients_s = 0.0 if parallel.zero_stage == 3 else self._reduced_s(2)
        shards = parallel.data if parallel.zero_stage else 1
        owned = self._params / shards
        self.update_s = _UPDATE_BYTES * owned / device.memory_bytes_per_s.at(_UPDATE_BYTES * owned)

    @property
    def _params(self) -> float:
        parallel = self._workload.parallel
        return self._workload.model.num_params / (parallel.tensor * parallel.pipeline)

    def _tape(self, model: Model) -> Tape:
        workload = self._workload
        shape = Shape(
            batch=workload.micro_batch,
            seq_len=workload.seq_len,
            element_bytes=workload.element_bytes,
            kernels=replace(MEGATRON, fused_attention=workload.fused_attention),
        )
        return tape_of(model, shape)

    def _edge_bytes(self) -> float:
        """Return the bytes between two layers."""
        workload = self._workload
        tokens = workload.micro_batch * workload.seq_len
        return float(tokens * workload.model.hidden_size * workload.element_bytes)

    def _summed_s(self, parallel: Parallel) -> float:
        """Return the seconds of a sum over the ranks of `tensor`: each sends almost all twice."""
        ranks = parallel.tensor
        if ranks == 1:
            return 0.0
        return 2 * (ranks - 1) / ranks * self._edge_bytes() / network_rate(self._machine, ranks)

    def _reduced_s(self, times: int) -> float:
        """Return the seconds in which parameters cross the ranks of `data` so often."""
        parallel = self._workload.parallel
        ranks = parallel.data
        if ranks == 1:
            return 0.0
        nbytes = self._params * self._workload.element_bytes * (ranks - 1) / ranks
        return times * nbytes / network_rate(self._machine, parallel.tensor * ranks)

    def _gathered_s(self, gathers: int) -> float:
        """Return the seconds of what ZeRO-3 sends for a micro-batch, while others are computed."""
        return self._reduced_s(gathers + 1) if self._workload.parallel.zero_stage == 3 else 0.0

    def _saved(self, tape: Tape, recompute: bool) -> tuple[float, float]:
        """Return what a micro-batch leaves of a stage's layers, and of what is around all layers.

        Where ranks share the sequence as well, that is all that the whole model saves, shared.
        """
        parallel, ranks = self._workload.parallel, 1
        if parallel.sequence and parallel.tensor > 1:
            tape, ranks = self._tape(self._workload.model), parallel.tensor
        layers = _layers_saved(tape)
        around = tape.saved_bytes() - layers
        if recompute:
            layers = len(tape.blocks) * self._edge_bytes()
        return layers / ranks / parallel.pipeline, around / ranks


def _layers_saved(tape: Tape) -> float:
    """Return what the layers save."""
    storages: set[Value] = {
        value.storage
        for block in tape.blocks
        for each in tape.operators[block.start : block.stop]
        for value in each.saves
    }
    return float(sum(storage.nbytes for storage in storages - {*tape.inputs}))
