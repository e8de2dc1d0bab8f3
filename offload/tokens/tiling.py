"""Modules that treat every token alone, run over a tile of the sequence after the other.

What a perceptron holds between its maps is then there for a tile at a time: where saved tensors
leave, each tile's are gone before the next one's are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Tiled", "in_evaluation", "is_position_wise"]

_NEARLY = 1e-2
"""Of outputs: rows alone are multiplied by other kernels than rows together."""


class Tiled:
    """Has a module run over tiles of at most `tokens` tokens, until `close()`d.

    The module's first argument is [batch, sequence, channels], and so is what it returns; a call
    with more, or of no more than a tile, goes through as it is. While `again` is set a tile saves
    what enters it and is run once more in the backward. Parameters' gradients are sums over tiles.

    The module keeps its place and its name: only its own attribute `forward` is another one
    meanwhile. Raises ValueError where it already has one of its own.
    """

    def __init__(self, module: nn.Module, tokens: int, *, again: bool = False) -> None:
        if tokens < 1:
            raise ValueError(f"tokens={tokens} of a tile is not a whole number from 1 up")
        if "forward" in vars(module):
            raise ValueError(
                f"{type(module).__name__} already has a forward of its own, by another library's "
                "hook say: run its tiles there, or leave it whole"
            )
        self._module, self._tokens, self.again = module, tokens, again
        self._whole = module.forward
        module.forward = self._forward

    def _forward(self, *inputs: Any, **named: Any) -> Any:
        x = inputs[0] if inputs else None
        if named or len(inputs) != 1 or not isinstance(x, Tensor) or x.dim() != 3:
            return self._whole(*inputs, **named)
        tokens = x.shape[0] * x.shape[1]
        if tokens <= self._tokens:
            return self._whole(x)
        # As of one sequence, so that each tile's rows lie behind each other.
        tiles = torch.split(x.reshape(1, tokens, -1), self._tokens, dim=1)
        return torch.cat([self._run(tile) for tile in tiles], dim=1).view(*x.shape[:2], -1)

    def _run(self, tile: Tensor) -> Tensor:
        if self.again and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._whole, tile, use_reentrant=False)
        else:
            out = self._whole(tile)
        return out

    def close(self) -> None:
        """Run it whole again. Idempotent."""
        if vars(self._module).get("forward") == self._forward:
            del self._module.forward


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Have a module, and each within it, be in evaluation; afterwards each is as it was."""
    modes = {each: each.training for each in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for each, training in modes.items():
            each.training = training


@torch.no_grad()
def is_position_wise(module: nn.Module, channels: int) -> bool:
    """Say whether a module gives [1, n, channels] for as much, each row from that row alone.

    Tried on three rows, in evaluation. A module that takes or returns anything else does not.
    """
    param = next(module.parameters(), None)
    device = param.device if param is not None else torch.device("cpu")
    dtype = param.dtype if param is not None and param.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 3, channels, generator=generator).to(device, dtype)
    try:
        with in_evaluation(module):
            together = module(rows)
            alone = [module(rows[:, at : at + 1]) for at in range(rows.shape[1])]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    if not isinstance(together, Tensor) or together.shape != rows.shape:
        return False
    if not all(isinstance(each, Tensor) for each in alone):
        return False
    scale = together.float().abs().max()
    return bool((torch.cat(alone, dim=1) - together).float().abs().max() <= _NEARLY * scale)
