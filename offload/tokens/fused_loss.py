"""The loss of a long sequence by a maintained library's kernel, where one is at hand.

Liger's makes logits and their gradients a chunk of tokens at a time, in one kernel. What the result
is, `segmented_cross_entropy` defines: where the library is not installed, is not for a device or
not for a head, that one makes it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from offload.tokens.causal_lm import Finish

__all__ = ["fused_cross_entropy"]


def fused_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    finish: Finish,
    targets: Tensor,
    *,
    count: Tensor | float | None,
    ignored: int,
) -> Tensor | None:
    """Return what `segmented_cross_entropy` does, by Liger's kernel; None where that cannot.

    It can on a GPU, in bf16 or fp32 of hidden states and head alike, for a head that is one map
    that nobody hooked or adapted, and logits that are capped at most.
    """
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return None
    if finish.multiplied is not None or finish.divided is not None:
        return None
    same = hidden.dtype == head.weight.dtype and hidden.dtype != torch.float16
    library = _liger() if _may_run_on(hidden.device) and same else None
    if library is None:
        return None
    flat = targets.reshape(-1)
    loss = library(ignore_index=ignored, reduction="sum", softcap=finish.cap)
    total: Tensor = loss(head.weight, hidden.reshape(flat.numel(), -1), flat, head.bias)
    return total / ((flat != ignored).sum() if count is None else count)


def _may_run_on(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _liger() -> Any:
    """Return Liger's loss, None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # noqa: PLC0415
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss
