"""How fast ranks send each other what, and what a step of each has to send.

Ranks of `tensor` are next to each other, then those of `context`, `data` and `pipeline`, as
Megatron-LM numbers them; a group that reaches over more ranks than a node has devices is as fast as
what joins nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from perfmodel.machine import Machine
from perfmodel.parameters import rank_parameters
from perfmodel.tape import Operator
from perfmodel.workload import Parallel, Workload

__all__ = ["RankTraffic", "network_rate", "operator_network_s", "rank_traffic", "sent_s"]

_BETWEEN_NODES_BYTES_PER_S = 25e9
"""Where a machine does not say: 200 Gb/s for each device, as in DGX A100 clusters."""
# What ranks of `context` send each other is keys and values, and it is attention that does.
_OF_CONTEXT = ("attention", "attention to all")
# Its sums over the vocabulary have no mirror: their gradients are each rank's own.
_OF_LOSS = "log softmax"


def network_rate(machine: Machine, span: int) -> float:
    """Return the bytes a second of each rank of a group that reaches over `span` of them in a row.

    Raises ValueError where those are on one node whose network is not known.
    """
    if span > machine.devices:
        return machine.between_nodes_bytes_per_s or _BETWEEN_NODES_BYTES_PER_S
    if not machine.network_bytes_per_s:
        raise ValueError(
            f"network_bytes_per_s=0 of {machine.name!r} joins no {span} ranks; add it to its "
            "machine.json"
        )
    return machine.network_bytes_per_s


def operator_network_s(
    operator: Operator, parallel: Parallel, machine: Machine
) -> tuple[float, float]:
    """Return for how long an operator's forward and its backward wait for what ranks send.

    The mirror of what the forward sends counts to the same operator, if that has a backward.
    """
    if not operator.network_bytes:
        return 0.0, 0.0
    span = parallel.tensor * (parallel.context if operator.name in _OF_CONTEXT else 1)
    rate = network_rate(machine, span)
    back = operator.backward_network_bytes
    if operator.name != _OF_LOSS:
        back += operator.network_bytes
    if not any(value.trained for value in operator.writes):
        back = 0.0
    return operator.network_bytes / rate, back / rate


@dataclass(frozen=True)
class RankTraffic:
    """What ranks send each other in a step beside their layers, in seconds of their network."""

    sum_s: float = 0.0
    """Of one sum of gradients, beside a backward."""
    sums: int = 1
    """Beside how many backwards there is one: the last, or all."""
    beside_all_s: float = 0.0
    """Gathers and sums where parameters are shared, beside every forward and backward."""
    after_s: float = 0.0
    """Updated parameters that are gathered again."""
    sent_s: float = 0.0
    """What a micro-batch waits for between a stage of a pipeline and the next, and back."""

    def busy_s(self, times: int) -> float:
        """Return all of a step of so many forwards and backwards."""
        return self.sums * self.sum_s + self.beside_all_s + self.after_s + times * self.sent_s

    def waited_s(self, times: int, backward_s: float, duration_s: float) -> float:
        """Return what a step of so many forwards and backwards waits; `duration_s`: of both."""
        beside_s = self.sums * max(0.0, self.sum_s - backward_s)
        beside_s += max(0.0, self.beside_all_s - times * duration_s)
        return beside_s + self.after_s + times * self.sent_s


def sent_s(workload: Workload, machine: Machine) -> float:
    """Return the seconds of what goes to the next stage of a pipeline, and of its gradient back.

    Ranks of `tensor` send a part each, which those of the next stage gather (Narayanan et al. 2021,
    section 4.1). Each of `chunks` parts of a stage has a next one.
    """
    parallel = workload.parallel
    if parallel.pipeline == 1:
        return 0.0
    elements = workload.micro_batch * workload.seq_len * workload.model.hidden_size
    nbytes = workload.element_bytes * elements / (parallel.tensor * parallel.context)
    return 2 * parallel.chunks * nbytes / network_rate(machine, parallel.ranks)


def rank_traffic(workload: Workload, machine: Machine) -> RankTraffic:
    """Return what crosses between the ranks of `data` and `context`, and between stages.

    Gradients are summed once a step: every rank gets the sum, or a part of it where ZeRO shares the
    states. From stage 2 on nobody keeps what is not its part, so that it is once a backward.
    PyTorch's stage 1 (ZeroRedundancyOptimizer) leaves the sums to DistributedDataParallel, and its
    stage 2 (FSDP2 that does not reshard after the forward) gathers parameters in each forward.
    """
    parallel, times = workload.parallel, workload.accumulation
    ranks, stage = parallel.data * parallel.context, parallel.zero_stage
    found = RankTraffic(sent_s=sent_s(workload, machine))
    if ranks == 1:
        return found
    fsdp = workload.framework == "torch" and stage > 1
    params = rank_parameters(workload)
    part_s = (ranks - 1) / ranks / network_rate(machine, parallel.tensor * ranks)
    trained = sum(each.count for each in params if each.trained) * part_s
    sum_s, updated_s = workload.gradient_element_bytes * trained, workload.element_bytes * trained
    if stage == 3 or fsdp:
        gathers = stage - 1
        gathered_s = workload.element_bytes * sum(each.count for each in params) * part_s
        return replace(found, beside_all_s=times * (gathers * gathered_s + sum_s))
    if stage == 0:
        return replace(found, sum_s=2 * sum_s)
    if workload.framework == "torch":
        return replace(found, sum_s=2 * sum_s, after_s=updated_s)
    sums = times if stage == 2 else 1
    return replace(found, sum_s=sum_s, sums=sums, after_s=updated_s)
