"""Gradients on their way to where states are updated: as they are accumulated, or at the step.

A gradient whose subgroups are all updated on the host leaves its device while the backward goes on,
in its own precision. By default that is a copy, which is used if the gradient is still the same at
the step. With `early_gradients` it is the gradient itself: `grad` is None once it has been taken,
and what later backwards add is added where it lies, in `accumulate_dtype`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from offload.config import OptimizerConfig
from offload.device import is_capturing
from offload.device.updates import UpdateDevice
from offload.native import ThreadPool, plain_sum, squared_norm
from offload.optimizer.accepted import flat_grad
from offload.optimizer.early_copies import EarlyCopies, EarlyCopy, place_bytes
from offload.optimizer.sharded import is_as_placed, is_sharded, is_where_computed

__all__ = ["Gradients", "StepGradients"]


@dataclass(frozen=True)
class StepGradients:
    """What one step has of each parameter with a gradient, in the order of parameters."""

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
        buffer_params = config.subgroup_params
        assert buffer_params is not None  # its owner has had it chosen
        if config.gradient_bytes is not None:  # of which buffers take no more than a quarter
            buffer_params = max(1, min(buffer_params, config.gradient_bytes // 32))
        self._copies = (
            EarlyCopies(device, buffer_params, adds=self._releases) if device is not None else None
        )
        self._held: dict[torch.Tensor, torch.Tensor] = {}  # taken, and not copied
        self._in_step = False
        self._hooks: dict[torch.Tensor, Any] = {}

    def watch(self, params: Sequence[torch.Tensor]) -> None:
        """Take the gradients of these when they are accumulated, from now on."""
        if any(_taken_by_another(param, self) for param in params):
            warnings.warn(
                "an AdamW with early_gradients=True takes gradients of these parameters, so that "
                "another one finds none: close() it first",
                RuntimeWarning,
                stacklevel=4,
            )
        if not self._releases and self._copies is None:
            return  # each is where it is used
        for param in params:
            if param.requires_grad and param not in self._hooks:
                hook: Any = param.register_post_accumulate_grad_hook  # not typed in torch
                self._hooks[param] = hook(self._accumulated)

    def host_bytes_of(self, param: torch.Tensor) -> int:
        """Return what the gradient of a parameter takes that leaves for the host."""
        return place_bytes(param, self._dtype or param.dtype)

    @property
    def buffer_bytes(self) -> int:
        """What host memory is taken beside, where any gradient leaves."""
        return self._copies.buffer_bytes if self._copies is not None else 0

    def leave_for_host(self, params: Iterable[torch.Tensor]) -> None:
        """Say which gradients leave for the host.

        Nothing may have been taken of them that a step is still to use.
        """
        if self._copies is not None:
            self._copies.make_room({param: self._dtype or param.dtype for param in params})

    # ---- the backward ------------------------------------------------------------------------

    def _accumulated(self, param: torch.Tensor) -> None:
        reason = self._why_not_early(param)
        if reason and self._releases:
            param.grad = None  # this backward is to be run again, and not to be added to
            raise RuntimeError(reason)
        if reason or param.grad is None or not is_as_placed(param.grad, param):
            return
        with torch.no_grad():
            if self._releases:
                self._take(param, param.grad)
            else:
                self._copy(param, param.grad)

    def _why_not_early(self, param: torch.Tensor) -> str:
        what = f"the gradient of a parameter of shape {tuple(param.shape)}"
        if self._in_step and self._releases:
            return (
                "a step has failed midway: call step() again to finish it with the gradients that "
                "it has, and run this backward after that"
            )
        if not is_sharded(param) and _has_other_ranks():
            return (
                f"early_gradients=True takes {what} before other ranks' are added to it; leave it "
                "out with DistributedDataParallel, or use FSDP2"
            )
        if not is_where_computed(param):
            return (
                f"early_gradients=True takes {what} while it may still be on its way to the host; "
                "leave it out with CPUOffloadPolicy"
            )
        if is_capturing():
            return f"early_gradients=True takes {what} once, and not in a CUDA graph's replays"
        return ""

    def _copy(self, param: torch.Tensor, grad: torch.Tensor) -> None:
        place = None if self._copies is None else self._copies.place_of(param)
        if place is None or grad.layout != torch.strided or grad.dtype != place.dtype:
            return  # the step takes it, or says why not
        assert self._copies is not None
        self._copies.send(param, flat_grad(param, grad), grad)

    def _take(self, param: torch.Tensor, grad: torch.Tensor) -> None:
        flat = flat_grad(param, grad)
        if self._copies is not None and self._leaves(param, flat, self._copies):
            self._copies.send(param, flat, grad)
        elif param in self._held:
            self._held[param].add_(flat)
        else:
            self._held[param] = flat if self._dtype is None else flat.to(self._dtype)
        param.grad = None

    def _leaves(self, param: torch.Tensor, flat: torch.Tensor, copies: EarlyCopies) -> bool:
        if param in self._held:
            return False  # where the first is
        place = copies.place_of(param)
        if place is None or copies.has_sent(param):
            return place is not None
        # Of whatever type the first one is, as on a device, unless one is asked for.
        return place.dtype == flat.dtype or self._dtype is not None

    # ---- the step ----------------------------------------------------------------------------

    @torch.no_grad()
    def of_step(self, params: Sequence[torch.Tensor], *, squares: bool = True) -> StepGradients:
        """Return all gradients; what was taken stays until `use_up`.

        Without a device their `squares` may be left out.

        Raises RuntimeError for a gradient that cannot be used, or what a copy failed with.
        """
        self.watch(params)  # those that were frozen before
        left = {
            param: flat_grad(param, param.grad) for param in params if param.grad is not None
        }  # before anything is taken
        for param in params if self._releases else ():
            if param.grad is not None:
                self._take(param, param.grad)
        copies = self._copies.arrived() if self._copies is not None else {}
        found = StepGradients()
        for param in params:  # in their order, in which norms are added
            if self._releases and param in copies:
                found.flat[param] = found.on_host[param] = copies[param].elements
            elif param in self._held:
                found.flat[param] = self._held[param]
            elif param in left:
                assert param.grad is not None
                found.given[param], found.flat[param] = param.grad, left[param]
        if squares or self._device is not None:
            found.squares.update(self._squares(found))
        if not self._releases:
            found.on_host.update(self._unchanged(copies, found))
        return found

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

    def _unchanged(
        self, copies: Mapping[torch.Tensor, EarlyCopy], found: StepGradients
    ) -> dict[torch.Tensor, torch.Tensor]:
        """Return the copies of which the gradient is still the same.

        A change through `.data` is not counted, but leaves another sum, or sum of squares.
        """
        same = [param for param, copy in copies.items() if copy.is_of(param.grad)]
        if not same:
            return {}
        assert self._device is not None
        sums = self._device.plain_sums(self._pool, [found.flat[param] for param in same])
        elements = {param: copies[param].elements for param in same}
        return {
            param: elements[param]
            for param, total in zip(same, sums, strict=True)
            if plain_sum(self._pool, elements[param]) == total
            and squared_norm(self._pool, elements[param]) == found.squares[param]
        }

    def use_up(self) -> None:
        """Say that a step has begun with what `of_step` returned: no later one is to have it."""
        self._in_step = True
        self.drop()

    def take_back(self) -> None:
        """Say that the step is done with its gradients."""
        self._in_step = False

    def drop(self) -> None:
        """Forget what has been taken."""
        self._held = {}
        if self._copies is not None:
            self._copies.drop()

    def memory_bytes(self) -> int:
        """Return what is set aside for gradients in host memory beside a device."""
        return self._copies.memory_bytes() if self._copies is not None else 0

    def close(self) -> None:
        """Take nothing any more, and give the memory back. Idempotent."""
        while self._hooks:
            self._hooks.popitem()[1].remove()
        self._held = {}
        if self._copies is not None:
            self._copies.close()


def _has_other_ranks() -> bool:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    return distributed.get_world_size() > 1


def _taken_by_another(param: torch.Tensor, own: Gradients) -> bool:
    """Say whether another optimizer takes the gradient of a parameter away."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    owners = [getattr(hook, "__self__", None) for hook in hooks.values()]
    return any(
        isinstance(owner, Gradients) and owner is not own and owner._releases for owner in owners
    )
