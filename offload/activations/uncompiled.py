"""Keeps `torch.compile` away from what autograd calls: near compiled code it looks at all code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["uncompiled"]

_F = TypeVar("_F", bound=Callable[..., Any])
# Not public; older versions of torch have no such thing. What is public wraps every call, and a
# hook of saved tensors is called too often for that.
_frames: Any = getattr(torch._C._dynamo, "eval_frame", None)


def uncompiled(function: _F) -> _F:
    """Have `function`, and what it calls, run as it is wherever it is called from."""
    if hasattr(_frames, "set_code_exec_strategy"):
        skip = _frames._FrameAction.SKIP
        strategy = _frames._FrameExecStrategy(skip, skip)
        _frames.set_code_exec_strategy(function.__code__, strategy)
    return function
