"""What each forward of a model kept, by forward: what runs again in the backward keeps the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offload.tokens.selection import Kept

__all__ = ["Pass", "Passes"]

_CHECKPOINTING = "_gradient_checkpointing_func"


@dataclass(eq=False)
class Pass:
    """One forward of a whole model in training; held by what its checkpoints hold."""

    dense: bool
    """Whether all tokens take part, whatever is said later."""
    given: Mapping[str, Any]
    """What the model was called with."""
    kept: dict[int, Kept] = field(default_factory=dict)
    """By layer."""
    bounds: tuple[Tensor, Tensor] | None = None
    """Which blocks are always kept, and which never."""


class Passes:
    """Knows which forward is under way in a model, and which one runs again in its backward.

    A model's own gradient checkpointing hands a function to torch, and that function is what runs
    again: it takes its forward along. Neither inputs nor the order of backwards tell them apart.
    """

    def __init__(self, model: nn.Module) -> None:
        self.closed = False
        self._under_way: list[Pass | None] = []
        self._again = threading.local()  # a GPU's backward runs in a thread of its own
        self._layers = [each for each in model.modules() if hasattr(each, "gradient_checkpointing")]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of a model takes along: no thread, and no forward under way."""
        return {**vars(self), "_again": None, "_under_way": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be a copy."""
        vars(self).update(state, _again=threading.local())

    def begin(self, own: Pass | None) -> None:
        """Have a forward under way; None: one in which nothing is left out."""
        self._under_way.append(own)
        if own is None:
            return
        for layer in self._layers:
            function = vars(layer).get(_CHECKPOINTING)
            if function is not None and not isinstance(function, _Carrying):
                setattr(layer, _CHECKPOINTING, _Carrying(function, self))

    def end(self) -> None:
        """Have the forward that began last be over."""
        if self._under_way:  # else it failed before it began
            self._under_way.pop()

    def current(self) -> Pass | None:
        """Return the forward that runs, or runs again; None: one that leaves nothing out.

        Raises RuntimeError for layers that somebody else runs again.
        """
        stack = getattr(self._again, "stack", None)
        if stack:
            found: Pass | None = stack[-1]
            return found
        if in_backward():
            raise RuntimeError(
                "a layer is run again by somebody who does not say of which forward it is, so that "
                "what it kept is not known: use model.gradient_checkpointing_enable()"
            )
        return self._under_way[-1] if self._under_way else None

    @contextmanager
    def within(self, own: Pass) -> Iterator[None]:
        """Have `own` be what runs in this thread."""
        if self.closed and in_backward() and not own.dense:
            raise RuntimeError(
                "tokens were left out of the forward of this backward, and what knows which ones "
                "is closed: call backward() before close()"
            )
        stack = self._again.__dict__.setdefault("stack", [])
        stack.append(own)
        try:
            yield
        finally:
            stack.pop()

    def carrying(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return what stands for `function` where it runs again: it takes this forward along."""
        own = self.current()
        if own is None:
            return function

        def carried(*inputs: Any, **named: Any) -> Any:
            with self.within(own):
                return function(*inputs, **named)

        return carried

    def close(self) -> None:
        """Leave the layers as they were. Idempotent."""
        self.closed = True
        self._under_way = []
        for layer in self._layers:
            function = vars(layer).get(_CHECKPOINTING)
            if isinstance(function, _Carrying) and function.passes is self:
                setattr(layer, _CHECKPOINTING, function.inner)


class _Carrying:
    """A model's checkpointing, of functions that take their forward along."""

    def __init__(self, inner: Callable[..., Any], passes: Passes) -> None:
        self.inner, self.passes = inner, passes

    def __call__(self, function: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        return self.inner(self.passes.carrying(function), *inputs, **named)

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "passes"):  # not there yet
            raise AttributeError(name)
        return getattr(self.inner, name)


def in_backward() -> bool:
    """Say whether autograd runs this thread's code."""
    return bool(torch._C._current_graph_task_id() != -1)
