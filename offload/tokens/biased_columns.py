"""Perceptrons that save a part of their inner channels: their gradient is biased.

What LeMo's published code does under the name of token elimination in Llama's perceptrons
(github.com/Pairshoe/Jenga-AE, ops/llama_ops.py): the forward is exact, and of the inner channels
only the largest are saved for the backward, as if the others had none. Unlike there nothing is
multiplied by zeros, and where a perceptron's own weights are trained it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BiasedColumns"]

_MAPS = ("gate_proj", "up_proj", "down_proj")


class BiasedColumns:
    """Has a gated perceptron save `share` of its inner channels, until `close()`d.

    Those with the largest norm over a tile of `tile_tokens` tokens, which choose each for
    themselves; all of them where `active` says no. What comes out is the module's own; **its
    gradient is not**: that of the other channels is taken to be zero. Raises ValueError for a
    perceptron that is not `gate_proj`, `up_proj` and `down_proj`, frozen and without adapters.
    """

    def __init__(
        self,
        module: nn.Module,
        share: float,
        *,
        tile_tokens: int,
        active: Callable[[], bool] = lambda: True,
    ) -> None:
        maps = [getattr(module, name, None) for name in _MAPS]
        act = getattr(module, "act_fn", None)
        if not all(type(each) is nn.Linear for each in maps) or not callable(act):
            raise ValueError(
                f"biased_mlp_columns: {type(module).__name__} is not a gate_proj, an up_proj and a "
                "down_proj alone, with an act_fn: leave it out (adapters beside them do not go "
                "with it either)"
            )
        if any(param.requires_grad for param in module.parameters()):
            raise ValueError(
                f"biased_mlp_columns: {type(module).__name__}'s weights are trained, and would get "
                "no gradient for most of their channels: freeze them, or leave it out"
            )
        self._module, self._share, self._tile_tokens = module, share, tile_tokens
        self._active = active
        self._before = vars(module).get("forward")
        self._whole = module.forward
        module.forward = self._forward

    def close(self) -> None:
        """Have it save all of them again. Idempotent."""
        if vars(self._module).get("forward") == self._forward:
            del self._module.forward
            if self._before is not None:
                self._module.forward = self._before

    def _forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad and self._active()):
            out: Tensor = self._whole(x)
            return out
        rows = x.reshape(-1, x.shape[-1])
        tiles = torch.split(rows, self._tile_tokens)
        found = [
            _Columns.apply(tile, self._module, self._share)  # type: ignore[no-untyped-call]
            for tile in tiles
        ]
        return torch.cat(found).view(x.shape)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, share: float) -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        active = module.act_fn(gate)
        out: Tensor = module.down_proj(active * up)
        count = math.ceil(share * gate.shape[-1])
        sizes = torch.linalg.vector_norm((active + up).float(), dim=0)
        columns = sizes.topk(count).indices.sort().values
        ctx.module, ctx.dtype = module, x.dtype
        ctx.save_for_backward(gate[:, columns], up[:, columns], columns)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up, columns = ctx.saved_tensors
        module: Any = ctx.module
        # Autocast had all of it in lower precision, and is not there in a backward.
        like = {"dtype": gate.dtype}
        grad = grads[0].to(**like) @ module.down_proj.weight[:, columns].to(**like)
        act: Callable[[Tensor], Tensor] = module.act_fn
        with torch.enable_grad():
            begun = gate.detach().requires_grad_(True)
            active = act(begun)
        [of_gate] = torch.autograd.grad(active, [begun], grad * up)
        of_up = grad * active.detach()
        of_x = of_gate @ module.gate_proj.weight[columns].to(**like)
        of_x = of_x + of_up @ module.up_proj.weight[columns].to(**like)
        return of_x.to(ctx.dtype), None, None
