"""Each forward of a module inside a session's, by the module's own hooks."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import torch

from offload.session import Session

__all__ = ["ModuleForward"]


class ModuleForward:
    """Has what `module` saves in a forward with gradients go where `session` has it, until closed.

    What is computed behind the module, a loss outside of it say, is not covered.
    """

    def __init__(self, module: torch.nn.Module, session: Session) -> None:
        self._session = session
        self._under_way: list[AbstractContextManager[object] | None] = []
        self._hooks = (
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        )

    def _begin(self, _module: torch.nn.Module, _inputs: Any) -> None:
        # One inside another, as of a module that calls itself, is part of that.
        outer = bool(self._under_way) or not torch.is_grad_enabled()
        forward = None if outer else self._session.forward()
        self._under_way.append(None)
        if forward is not None:
            forward.__enter__()
            self._under_way[-1] = forward

    def _end(self, _module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        if not self._under_way:
            return  # the forward failed before it began
        forward = self._under_way.pop()
        if forward is not None:
            forward.__exit__(*sys.exc_info())

    def close(self) -> None:
        """Take the hooks away. Idempotent."""
        for hook in self._hooks:
            hook.remove()
