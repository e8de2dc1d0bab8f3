"""What SSDTrain's adaptive offloading chooses, to compare with and to begin from."""

from __future__ import annotations

from perfmodel.schedules.replay import KEPT
from perfmodel.schedules.trace import Channel, Trace

__all__ = ["prefix_cut"]


def prefix_cut(trace: Trace, channel: Channel) -> list[int]:
    """Return the choice of SSDTrain's adaptive offloading: a prefix of the step leaves.

    Its rule (`solve_num_adaptive_keep_layers` in the authors' code): walk the nodes in the order of
    the forward and keep the first, with everything after it, for which offloading all before it and
    reloading it takes more than the write bandwidth until it is needed, the backward being taken to
    last twice the forward. Times are of the trace's forward: until the last tensor is saved.
    """
    tensors = trace.tensors
    choice = [KEPT] * len(tensors)
    if not tensors:
        return choice
    forward_s = tensors[-1].saved_s
    before_bytes, before_s = 0, 0.0
    for index, tensor in enumerate(tensors):
        volume = before_bytes + 2 * tensor.nbytes
        time_s = 3 * forward_s - 2 * before_s
        if volume > channel.write_bytes_per_s * time_s:
            break
        choice[index] = KEPT if tensor.held else 0
        before_bytes += tensor.nbytes
        before_s = tensor.saved_s
    return choice
