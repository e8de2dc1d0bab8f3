"""The few CUDA calls of megatron-core 0.16.1 that stand in the way of training it on a CPU.

For tests alone: the schedules, DDP and optimizers under it are the real ones, over gloo. What needs
which: a generator for its random states always; `current_device` always; factories with
`device="cuda"` in schedules and optimizers; `synchronize` in pipelines; tensor type names in
optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["Norm", "install"]

_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn")
_CPU = torch.device("cpu")


def install() -> None:
    """Put them in place for this process, where there is no GPU."""
    if torch.cuda.is_available():
        return
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    # Of Transformer Engine, and asked for without it.
    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = lambda **_: nullcontext()
    random.fp8_autocast = lambda **_: nullcontext()
    moe_utils.te_general_gemm = None
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    generator = torch.Generator()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        generator.set_state(state)

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return generator.get_state()

    torch.cuda.manual_seed = lambda seed: generator.manual_seed(seed) and None  # type: ignore[assignment]
    torch.cuda.get_rng_state = get_state
    torch.cuda.set_rng_state = set_state  # type: ignore[assignment]
    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    stock = torch.Tensor.type

    def named(self: torch.Tensor, *args: Any, **more: Any) -> Any:
        found: Any = stock(self, *args, **more)
        return found if args or more else found.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = named  # type: ignore[assignment, method-assign]


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **named: Any) -> Any:
        if str(named.get("device", "")).startswith("cuda"):
            named["device"] = _CPU
        return factory(*args, **named)

    return made


class Norm(torch.nn.LayerNorm):
    """A norm for sequence parallel, which megatron-core has none of without Transformer Engine."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
