"""What of `torch.optim.AdamW` is offered, and which parameters and gradients can be taken."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from offload.config import OptimizerConfig
from offload.device.cuda_updates import CudaUpdates
from offload.device.updates import UpdateDevice
from offload.native import AdamSettings, ThreadPool
from offload.optimizer.layout import flat_view
from offload.optimizer.sharded import as_placed, local_part
from perfmodel.plan import require_known

__all__ = [
    "TORCHS",
    "flat_grad",
    "listed",
    "pool_of",
    "require_norm",
    "require_settings",
    "require_trainable",
    "settings_of",
    "tensors_of",
    "updates_beside",
    "without_torchs",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How to compute: no question here.
_HINTS = ("foreach", "fused")
_OF_ALL_GROUPS = {field.name for field in fields(OptimizerConfig)}
_NOT_OFFERED = ("amsgrad", "capturable", "differentiable")
TORCHS: dict[str, Any] = {
    **dict.fromkeys(_HINTS),
    **dict.fromkeys(_NOT_OFFERED, False),
    "decoupled_weight_decay": True,
}
"""What else a parameter group of `torch.optim.AdamW` has, so that its checkpoints and ours are
alike."""


def without_torchs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` without those of `torch.optim.AdamW` that mean nothing here.

    Raises ValueError where one asks for what is not offered, or is not known.
    """
    known = {"lr", "betas", "eps", "weight_decay", "maximize", "max_norm", "emulated_device"}
    known.add("skip_nonfinite")
    known |= {field.name for field in fields(OptimizerConfig)}
    require_known("AdamW", settings.keys() - {*_HINTS, *_NOT_OFFERED}, sorted(known))
    for key in _NOT_OFFERED:
        _require_none(key, settings.get(key, False))
    named = {
        key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for key, value in settings.items()
    }
    return {key: value for key, value in named.items() if key not in _HINTS + _NOT_OFFERED}


def settings_of(group: Mapping[str, Any]) -> AdamSettings:
    """Return what the arithmetic needs of a parameter group. Raises as `require_settings`."""
    require_settings(group)
    beta1, beta2 = group["betas"]
    return AdamSettings(
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
    )


def _require_none(key: str, value: object) -> None:
    if value:
        raise ValueError(f"{key}={value} is not offered; leave it out, or use torch.optim.AdamW")


def require_settings(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a parameter group that cannot be trained so."""
    for key in _NOT_OFFERED:
        _require_none(key, group[key])
    if not group["decoupled_weight_decay"]:
        raise ValueError("decoupled_weight_decay=False is Adam's, not AdamW's; it is not offered")
    for key in group.keys() & _OF_ALL_GROUPS:
        raise ValueError(f"{key} is a setting of the whole AdamW, and not of a parameter group")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} are not two numbers")
    beta1, beta2 = betas
    for key, value, most in (
        ("lr", group["lr"], math.inf),
        ("eps", group["eps"], math.inf),
        ("weight_decay", group["weight_decay"], math.inf),
        ("betas[0]", beta1, 1.0),
        ("betas[1]", beta2, 1.0),
    ):
        require_number(key, value)
        if not 0 <= value < most:
            raise ValueError(f"{key}={value!r} is not at least 0 and less than {most}")


def require_number(key: str, value: object) -> None:
    """Raise ValueError where `value` is no number, nor a tensor of one."""
    one = isinstance(value, torch.Tensor) and value.numel() == 1
    if not one and not isinstance(value, (int, float)):
        raise ValueError(f"{key}={value!r} is no number")


def require_norm(max_norm: float | None) -> None:
    """Raise ValueError where `max_norm` is neither None nor something to clip to."""
    if max_norm is None:
        return
    require_number("max_norm", max_norm)
    if not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm={max_norm!r} is not a norm to clip to; give more than 0")


def pool_of(config: OptimizerConfig) -> ThreadPool:
    """Return the threads that update on the host. Raises ValueError for CPUs that are not there."""
    allowed = os.sched_getaffinity(0)
    if not allowed.issuperset(config.cpus):
        raise ValueError(
            f"cpus={config.cpus} are not all this process's: it may use "
            f"{', '.join(map(str, sorted(allowed)))}"
        )
    threads = config.threads or len(config.cpus) or torch.get_num_threads()
    return ThreadPool(threads, config.cpus)


def listed(params: Iterable[Any]) -> list[Any]:
    """Return parameters, or groups of them, that can be gone through more than once.

    Raises TypeError for a single tensor, as `torch.optim.AdamW` does.
    """
    if isinstance(params, torch.Tensor):
        raise TypeError("params is one tensor; give a list of parameters, or of groups of them")
    found = []
    for each in params:
        if isinstance(each, Mapping) and isinstance(each.get("params"), Iterator):
            each = {**each, "params": [*each["params"]]}
        found.append(each)
    return found


def updates_beside(params: Sequence[Any]) -> UpdateDevice | None:
    """Return the GPU that `listed` parameters lie on; None where that is the host.

    Raises ImportError where there is one and the kernels were not built.
    """
    for param in tensors_of(params):
        if param.is_cuda:
            return CudaUpdates(param.device)
    return None


def tensors_of(params: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Yield the parameters of what `listed` returned."""
    for each in params:
        some = each.get("params", ()) if isinstance(each, Mapping) else each
        for param in some if isinstance(some, (list, set)) else [some]:
            param = param[1] if isinstance(param, tuple) else param  # with its name
            if isinstance(param, torch.Tensor):
                yield param


def require_trainable(param: torch.Tensor, device: UpdateDevice | None = None) -> None:
    """Raise ValueError for a parameter that cannot be trained so; `device`: where all must lie."""
    if param.dtype not in _DTYPES:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is {param.dtype}; "
            "it can be float32, bfloat16 or float16"
        )
    expected = torch.device("cpu") if device is None else device.device
    if param.device != expected:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is on {param.device}, and others are on "
            f"{expected}; one AdamW updates those of one device"
        )
    flat_view(param.detach())


def flat_grad(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return a gradient's elements in the order of its parameter's."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} has a {grad.layout} gradient; "
            "sparse ones are not offered: use torch.optim.SparseAdam for it"
        )
    if grad.dtype not in _DTYPES:
        raise RuntimeError(f"a gradient is {grad.dtype}; it can be float32, bfloat16 or float16")
    grad, param = local_part(as_placed(grad, param)), local_part(param)
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return flat_view(grad.detach())
