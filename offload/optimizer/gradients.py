"""Gradients on their way to where states are updated: as they are accumulated, or at the step.

A gradient whose subgroups are all updated on the host leaves its device while the backward goes on,
in its own precision. By default that is a copy, which is used if the gradient is still the same at
the step. With `early_gradients` it is the gradient itself: `grad` is None once it has been taken,
and what later backwards add is added where it lies, in `accumulate_dtype`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from offload.config import OptimizerConfig
from offload.device.updates import UpdateDevice
from offload.native import ThreadPool, squared_norm
from offload.optimizer.accepted import flat_grad
from offload.optimizer.early_copies import EarlyCopies
from offload.optimizer.sharded import is_as_placed, is_sharded

__all__ = ["Gradients", "StepGradients"]


@dataclass(frozen=True)
class StepGradients:
    """What one step has of each parameter with a gradient."""

    given: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    """Each `grad`, of those that have one."""
    flat: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    """The elements, in the order of their parameter's, on the device or taken to the host."""
    on_host: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    """The same, of those that are in host memory beside a device."""
    squares: dict[torch.Tensor, float] = field(default_factory=dict)
    """Sums of squares: of the same bits wherever the gradient is."""


class Gradients:
    """Owns what leaves early, and the hooks by which it does, until it is closed."""

    def __init__(
        self, device: UpdateDevice | None, pool: ThreadPool, config: OptimizerConfig
    ) -> None:
        self._device, self._pool = device, pool
        self._releases = config.early_gradients
        name = config.accumulate_dtype
        self._dtype: torch.dtype | None = None if name is None else getattr(torch, name)
        self._copies = (
            EarlyCopies(device, config.subgroup_params, releases=self._releases)
            if device is not None
            else None
        )
        self._held: dict[torch.Tensor, torch.Tensor] = {}  # released, and not copied
        self._hooks: list[Any] = []

    def watch(self, params: Iterable[torch.Tensor]) -> None:
        """Take the gradients of these when they are accumulated, from now on."""
        if not self._releases and self._copies is None:
            return  # each is where it is used
        for param in params:
            if param.requires_grad:
                hook: Any = param.register_post_accumulate_grad_hook  # not typed in torch
                self._hooks.append(hook(self._accumulated))

    def leave_for_host(self, params: Mapping[torch.Tensor, torch.dtype]) -> None:
        """Say which gradients leave for the host, and of what type each is accumulated there."""
        if self._copies is not None:
            self._copies.make_room({param: self._dtype or dtype for param, dtype in params.items()})

    def _accumulated(self, param: torch.Tensor) -> None:
        alone = is_sharded(param) or not _has_other_ranks()
        if not alone:
            if self._releases:
                raise RuntimeError(
                    f"early_gradients=True takes the gradient of a parameter of shape "
                    f"{tuple(param.shape)} before other ranks' are added to it; leave it out with "
                    "DistributedDataParallel, or use FSDP2"
                )
            return  # the others' will change it
        if param.grad is not None and is_as_placed(param.grad, param):
            with torch.no_grad():
                self._take(param, param.grad)

    def _take(self, param: torch.Tensor, grad: torch.Tensor) -> None:
        flat = flat_grad(param, grad)
        if self._copies is not None and self._leaves(param, flat, self._copies):
            self._copies.send(param, flat, grad)
        elif self._releases and param in self._held:
            self._held[param].add_(flat)
        elif self._releases:
            self._held[param] = flat if self._dtype is None else flat.to(self._dtype)
        if self._releases:
            param.grad = None

    def _leaves(self, param: torch.Tensor, flat: torch.Tensor, copies: EarlyCopies) -> bool:
        if param in self._held:
            return False  # where the first is
        place = copies.place_of(param)
        if place is None or copies.has_sent(param):
            return place is not None
        # Of whatever type the first one is, as on a device, unless one is asked for.
        return place.dtype == flat.dtype or self._dtype is not None

    @torch.no_grad()
    def of_step(self, params: Sequence[torch.Tensor]) -> StepGradients:
        """Return all gradients; those that were taken are used up.

        Raises RuntimeError for a gradient that cannot be used, or whose copy has failed.
        """
        for param in params:
            if self._releases and param.grad is not None and self._was_taken(param):
                self._take(param, param.grad)  # given by hand, to what has been taken before
        left = {
            param: flat_grad(param, param.grad) for param in params if param.grad is not None
        }  # before anything is used up
        copies = self._copies.arrived() if self._copies is not None else {}
        held, self._held = self._held, {}
        found = StepGradients()
        for param in params:  # in their order, in which norms are added
            if self._releases and param in copies:
                found.flat[param] = found.on_host[param] = copies[param].elements
            elif param in held:
                found.flat[param] = held[param]
            elif param in left:
                assert param.grad is not None
                found.given[param], found.flat[param] = param.grad, left[param]
        found.squares.update(self._squares(found))
        if not self._releases:
            for param, copy in copies.items():
                if copy.is_of(param.grad, found.squares.get(param)):
                    found.on_host[param] = copy.elements
        return found

    def _was_taken(self, param: torch.Tensor) -> bool:
        sent = self._copies is not None and self._copies.has_sent(param)
        return sent or param in self._held

    def _squares(self, found: StepGradients) -> dict[torch.Tensor, float]:
        # One sum in one order: the same wherever the gradients are.
        far = [param for param in found.flat if param not in found.on_host]
        values = [found.flat[param] for param in far]
        if self._device is not None:
            squares = self._device.squared_norms(self._pool, values)
        else:
            squares = [squared_norm(self._pool, value) for value in values]
        near = {param: squared_norm(self._pool, flat) for param, flat in found.on_host.items()}
        squares_of = {**dict(zip(far, squares, strict=True)), **near}
        return {param: squares_of[param] for param in found.flat}

    def take_back(self) -> None:
        """Say that the last step's are not used any more."""
        if self._copies is not None:
            self._copies.take_back()

    def drop(self) -> None:
        """Forget what has been taken."""
        self._held = {}
        if self._copies is not None:
            self._copies.drop()

    def close(self) -> None:
        """Take nothing any more, and give the memory back. Idempotent."""
        while self._hooks:
            self._hooks.pop().remove()
        self._held = {}
        if self._copies is not None:
            self._copies.close()


def _has_other_ranks() -> bool:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    return distributed.get_world_size() > 1
