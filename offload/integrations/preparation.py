"""What an optimizer of ours needs before the first step of a framework, on all ranks or on none."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from offload.config import OptimizerConfig
from offload.device.cuda_updates import CudaUpdates
from offload.device.updates import UpdateDevice
from offload.integrations.deferred_adamw import DeferredAdamW

__all__ = ["close_all", "device_beside", "prepare_states", "require_all"]

_log = logging.getLogger(__name__)


def prepare_states(engine: Any, optimizer: DeferredAdamW, opened: list[Any]) -> None:
    """Make the states of all that DeepSpeed's `engine` trains, and lend it its GPU.

    What is to be closed after the optimizer is added to `opened`. Raises OSError where there is no
    room.
    """
    optimizer.lent_device = device_beside(engine.device, optimizer.config)
    if optimizer.lent_device is not None:
        opened.append(optimizer.lent_device)
    optimizer.prepare(_partitions(engine, optimizer))


def device_beside(device: torch.device, config: OptimizerConfig) -> UpdateDevice | None:
    """Return the GPU that is to update some of what a framework has put on the host.

    None where there is none, its kernels were not built, or the plan wants the host to do all.
    """
    wanted = config.update_schedule
    if device.type != "cuda" or wanted == "host":
        return None
    try:
        return CudaUpdates(device)
    except ImportError as error:
        if wanted != "auto":
            raise
        _log.warning("the host updates all that lies there, since the GPU cannot: %s", error)
        return None


def _partitions(
    engine: Any, optimizer: DeferredAdamW
) -> Iterator[tuple[Mapping[str, Any], Sequence[torch.Tensor]]]:
    """Yield all that DeepSpeed trains, with the group whose settings it has.

    ZeRO-3 shows its subgroups one after the other, at the step (deepspeed 0.19.8,
    runtime/zero/stage3.py, `_optimizer_step`), where one rank that has no room would leave the
    others waiting.
    """
    groups = optimizer.param_groups
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    number_of = getattr(engine.optimizer, "sub_group_to_group_id", None)
    if flat is None or number_of is None:
        yield from ((group, group["params"]) for group in groups)
        return
    for number, group in enumerate(groups):
        yield group, [param for at, param in enumerate(flat) if number_of[at] == number]


def require_all(error: Exception | None) -> None:
    """Raise the error of this rank, or of another one. All ranks must call this."""
    said: list[str | None] = [None if error is None else f"{type(error).__name__}: {error}"]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        mine, said = said[0], [None] * dist.get_world_size()
        dist.all_gather_object(said, mine)
    if error is not None:
        raise error
    for rank, words in enumerate(said):
        if words is not None:
            raise RuntimeError(f"rank {rank} cannot apply its plan: {words}")


def close_all(opened: Sequence[Any]) -> None:
    """Close all in their order, whatever one of them raises."""
    with ExitStack() as stack:
        for each in reversed(opened):
            stack.callback(each.close)
