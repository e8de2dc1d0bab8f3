"""Whether a block may be run again in the backward: what it uses must be as it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from offload.activations.saved import changed_in_place

__all__ = ["Used"]

# Of a block's graph; one that reaches far outside of its arguments is not followed to its end.
_MOST_NODES = 4096


class Used:
    """The tensors that one run of a block uses and that outlive it, with their versions.

    Its arguments, the parameters and buffers of the modules that it calls, and other leaves of its
    graph. What else a function reaches (constants, Python's own state) is not seen.
    """

    def __init__(self, args: Iterable[torch.Tensor]) -> None:
        self._versions: dict[int, tuple[torch.Tensor, int]] = {}
        self._buffers: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self._modules: set[int] = set()
        self._args = list(args)
        self._changes_itself = False
        for tensor in self._args:
            self._note(tensor)

    def _note(self, tensor: torch.Tensor) -> None:
        if not tensor.is_inference():  # those have no version
            self._versions.setdefault(id(tensor), (tensor, tensor._version))

    def note_module(self, module: torch.nn.Module) -> None:
        """Take in that `module` is about to run."""
        for part in module.modules() if id(module) not in self._modules else ():
            if id(part) in self._modules:
                continue
            self._modules.add(id(part))
            for parameter in part._parameters.values():
                if parameter is not None:
                    self._note(parameter)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    self._note(buffer)
                    self._buffers.append((part._buffers, name, buffer))
            # Their kernel writes to buffers behind the version counter.
            self._changes_itself |= part.training and bool(
                getattr(part, "track_running_stats", False)
            )

    def ended(self, out: Iterable[object]) -> bool:
        """Take in that the run has ended; say whether it left all that it used as it was."""
        same = not self._changes_itself
        same &= all(tensor._version == seen for tensor, seen in self._versions.values())
        same &= all(holder.get(name) is tensor for holder, name, tensor in self._buffers)
        self._note_leaves(out)
        for tensor in self._args:  # which leave, and are checked when they are back
            self._versions.pop(id(tensor), None)
        self._args, self._buffers = [], []
        # What the run has changed it will change again; from now on nobody else may.
        self._versions = {
            key: (tensor, tensor._version) for key, (tensor, _) in self._versions.items()
        }
        return same

    def _note_leaves(self, out: Iterable[object]) -> None:
        """Take in the parameters that were used without their module."""
        seen = {arg.grad_fn for arg in self._args}
        todo: list[Any] = [tensor.grad_fn for tensor in out if isinstance(tensor, torch.Tensor)]
        while todo and len(seen) < _MOST_NODES:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
            todo += [following for following, _ in node.next_functions]

    def require_unchanged(self) -> None:
        """Raise RuntimeError where a tensor is another one than the block was run with."""
        for tensor, version in self._versions.values():
            if tensor._version != version:
                what = f"a tensor of shape {tuple(tensor.shape)} that a recomputed block uses"
                raise changed_in_place(what, tensor._version, version)
