"""How fast ranks send each other what, and what a step of each has to send.

Ranks of `tensor` are next to each other, then those of `context`, `data` and `pipeline`, as
Megatron-LM numbers them; a group that reaches over more ranks than a node has devices is as fast as
what joins nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from perfmodel.machine import Machine
from perfmodel.parameters import rank_parameters
from perfmodel.tape import Operator
from perfmodel.workload import Parallel, Workload

__all__ = ["RankTraffic", "network_rate", "operator_network_s", "rank_traffic"]

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
    """What ranks that share batches send each other in a step, in seconds of their network."""

    beside_backward_s: float = 0.0
    """Sums of gradients, beside the last backward."""
    beside_all_s: float = 0.0
    """Gathers and sums of ZeRO-3, beside every forward and backward."""
    after_s: float = 0.0
    """Updated parameters that are gathered again."""

    @property
    def busy_s(self) -> float:
        """All of it."""
        return self.beside_backward_s + self.beside_all_s + self.after_s

    def waited_s(self, backward_s: float, all_s: float) -> float:
        """Return what a step waits, of whose forwards and backwards `all_s` are in all."""
        beside_s = max(0.0, self.beside_backward_s - backward_s)
        return beside_s + max(0.0, self.beside_all_s - all_s) + self.after_s


def rank_traffic(workload: Workload, machine: Machine) -> RankTraffic:
    """Return what crosses between the ranks of `data` and `context`."""
    parallel = workload.parallel
    ranks = parallel.data * parallel.context
    if ranks == 1:
        return RankTraffic()
    rate = network_rate(machine, parallel.tensor * ranks)
    trained = sum(each.count for each in rank_parameters(workload) if each.trained)
    whole = sum(each.count for each in rank_parameters(workload))
    once_s = workload.element_bytes * (ranks - 1) / ranks / rate
    if parallel.zero_stage == 3:
        return RankTraffic(beside_all_s=workload.accumulation * (2 * whole + trained) * once_s)
    if parallel.zero_stage:
        return RankTraffic(trained * once_s, after_s=trained * once_s)
    return RankTraffic(2 * trained * once_s)
