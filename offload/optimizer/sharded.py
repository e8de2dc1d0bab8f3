"""Parameters that several ranks hold a part of: DTensor, as FSDP2 and tensor parallelism have them.

Every rank updates its own part. Only the sum of squares of all gradients goes between ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "as_placed",
    "is_as_placed",
    "is_sharded",
    "is_where_computed",
    "local_part",
    "require_unsharded",
    "sum_over_ranks",
    "written",
]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is a DTensor."""
    if type(tensor) in _PLAIN or not torch.distributed.is_available():
        return False
    return isinstance(tensor, _dtensor())


def _dtensor() -> type[DTensor]:
    # It takes long to import, and whoever has one has imported it.
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    return DTensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, over the same memory; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    part = tensor.to_local()  # type: ignore[attr-defined]
    assert isinstance(part, torch.Tensor)
    return part


def as_placed(tensor: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Return `tensor` placed over ranks as `param` is; all ranks must call this alike.

    A plain one is taken to be whole, and the same on every rank.
    """
    given: Any = tensor
    if not is_sharded(param):
        return given.full_tensor() if is_sharded(tensor) else tensor
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if is_sharded(tensor):
        return given.redistribute(mesh, placements)  # type: ignore[no-any-return]
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def is_where_computed(param: torch.Tensor) -> bool:
    """Say whether a parameter is where its gradient comes from: not so with CPUOffloadPolicy."""
    if not is_sharded(param):
        return True
    return bool(param.device_mesh.device_type == param.device.type)  # type: ignore[attr-defined]


def require_unsharded(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return `params`. Raises ValueError where ranks have parts of one."""
    for param in params:
        if is_sharded(param):
            raise ValueError(
                f"ranks have parts of a parameter of shape {tuple(param.shape)} (DTensor), and "
                "one file has whole ones; use torch.distributed.checkpoint with state_dict()"
            )
    return params


def is_as_placed(tensor: torch.Tensor, param: torch.Tensor) -> bool:
    """Say whether `as_placed` has nothing to do."""
    if not is_sharded(param) or not is_sharded(tensor):
        return is_sharded(param) == is_sharded(tensor)
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return bool(tensor.device_mesh == mesh and tensor.placements == placements)  # type: ignore[attr-defined]


def sum_over_ranks(parts: Mapping[torch.Tensor, float]) -> float:
    """Return the sum of what each parameter's part on this rank has, over all parts of all ranks.

    What several ranks have alike counts once. All ranks must call this with the same parameters.
    """
    alone, shared = 0.0, dict[Any, float]()
    for param, value in parts.items():
        if is_sharded(param):
            key = param.device_mesh, param.placements  # type: ignore[attr-defined]
            shared[key] = shared.get(key, 0.0) + value
        else:
            alone += value
    for (mesh, placements), value in shared.items():
        alone += _over_mesh(value, mesh, placements)
    return alone


def _over_mesh(value: float, mesh: Any, placements: Any) -> float:
    from torch.distributed.tensor import Partial, Replicate  # noqa: PLC0415

    # What is not finite is so everywhere, whoever has it.
    part = torch.tensor(value if math.isfinite(value) else math.nan, dtype=torch.float64)
    kinds = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    part = part.to(mesh.device_type)
    return float(_dtensor().from_local(part, mesh, kinds, run_check=False).full_tensor())


def written(param: torch.Tensor) -> tuple[int, int]:
    """Return what is another one once somebody has written a parameter, or given it new memory."""
    return param._version, local_part(param).data_ptr()
