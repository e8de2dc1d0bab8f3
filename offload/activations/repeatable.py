"""Whether a block may be run again in the backward: what it uses must be as it was."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.nn import Module, Parameter

from offload.activations.saved import changed_in_place

__all__ = ["Mark", "Marks", "Used", "reached_modules"]

# Of a block's graph; one that reaches far outside of its arguments is not followed to its end.
_MOST_NODES = 4096
_PLAIN = (torch.Tensor, Parameter)
_FEW_MODULES = 1024

Mark = tuple[object, ...]
"""What a block is, as far as can be told before it runs: its modules and their modes."""


def reached_modules(function: object, args: Iterable[object]) -> tuple[list[Module], list[Module]]:
    """Return the modules that a block consists of, and those that it can merely reach.

    The former are itself and its arguments; the latter what a method is bound to, or a function
    closes over, which may be the whole model that the block is a part of.
    """
    own: list[Module] = [arg for arg in args if isinstance(arg, Module)]
    near: list[Module] = []
    todo, seen = [function], set[int]()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Module):
            (own if one is function else near).append(one)
        elif isinstance(one, functools.partial):
            own += [arg for arg in (one.func, *one.args) if isinstance(arg, Module)]
            todo.append(one.func)
        elif isinstance(one, MethodType):
            holder = one.__self__
            if isinstance(holder, Module) and one.__name__ == "forward":
                own.append(holder)
            else:
                todo += [holder, one.__func__]
        elif isinstance(one, FunctionType):
            todo += [cell.cell_contents for cell in one.__closure__ or () if _is_filled(cell)]
    return own, near


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


class Marks:
    """Gives modules numbers, which no other one gets later, and tells blocks from one another."""

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[weakref.ref[Module], int]] = {}
        self._count = 0
        self._alive = _FEW_MODULES  # when it was last looked at

    def of(self, function: object, args: Sequence[object]) -> Mark:
        """Return the mark of a block that is about to run."""
        own, near = reached_modules(function, args)
        if not own and not near:
            return (getattr(function, "__qualname__", type(function).__name__),)
        modes = tuple(part.training for module in own for part in module.modules())
        near_modes = tuple(module.training for module in near)
        return (*map(self._number, (*own, *near)), modes, near_modes)

    def _number(self, module: Module) -> int:
        known = self._numbers.get(id(module))
        if known is not None and known[0]() is module:
            return known[1]
        self._count += 1
        self._numbers[id(module)] = weakref.ref(module), self._count
        if len(self._numbers) > 2 * self._alive:  # of modules that are gone, say
            self._numbers = {key: it for key, it in self._numbers.items() if it[0]() is not None}
            self._alive = max(_FEW_MODULES, len(self._numbers))
        return self._count


class Used:
    """The tensors that one run of a block uses and that outlive it, with their versions.

    Its arguments, the parameters and buffers of the modules that it calls, and other leaves of its
    graph. What else a function reaches (constants, Python's own state) is not seen.
    """

    def __init__(
        self, args: Iterable[torch.Tensor], own: Iterable[Module] = (), near: Iterable[Module] = ()
    ) -> None:
        self._versions: dict[int, tuple[torch.Tensor, int]] = {}
        # Parameters and buffers where their modules have them.
        self._named: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        # The same of buffers that the run may reach, with their versions, until it has ended.
        self._reachable: list[tuple[dict[str, Any], str, torch.Tensor, int]] = []
        self._modes: dict[int, tuple[Module, bool]] = {}
        self._args = list(args)
        self.unrepeatable = False
        """What is known already is enough to say so."""
        for tensor in self._args:
            self._note(tensor)
        for module in own:  # one that is compiled runs no hooks that would tell
            self.note_module(module)
        for module in near:
            self._note_reachable(module)

    def _note(self, tensor: torch.Tensor) -> None:
        if not tensor.is_inference():  # those have no version
            self._versions.setdefault(id(tensor), (tensor, tensor._version))

    def _note_reachable(self, module: Module) -> None:
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and not buffer.is_inference():
                    self._reachable.append((part._buffers, name, buffer, buffer._version))

    def note_module(self, module: Module) -> None:
        """Take in that `module` is about to run."""
        for part in module.modules() if id(module) not in self._modes else ():
            if id(part) in self._modes:
                continue
            self._modes[id(part)] = part, part.training
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        self._note(tensor)
                        self._named.append((held, name, tensor))
            # Their kernel writes to buffers behind the version counter.
            norm = part.training and getattr(part, "track_running_stats", False)
            # `torch.func.functional_call` lends parameters for the time of a call.
            lent = any(
                tensor is not None and not isinstance(tensor, Parameter)
                for tensor in part._parameters.values()
            )
            self.unrepeatable |= bool(norm) or lent

    def ended(self, out: Iterable[object]) -> bool:
        """Take in that the run has ended; say whether it left all that it used as it was."""
        same = not self.unrepeatable
        same &= all(tensor._version == seen for tensor, seen in self._versions.values())
        same &= all(held.get(name) is tensor for held, name, tensor in self._named)
        same &= all(
            held.get(name) is buffer and buffer._version == seen
            for held, name, buffer, seen in self._reachable
        )
        self._note_leaves(out)
        for tensor in self._args:  # which leave, and are checked when they are back
            self._versions.pop(id(tensor), None)
        self._args, self._reachable = [], []
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

    def run_again(self, function: Callable[[], Any]) -> Any:
        """Return `function()`, in the modes that modules had.

        Raises RuntimeError where a tensor is another one than the block was run with.
        """
        for tensor, version in self._versions.values():
            if tensor._version != version:
                what = f"a tensor of shape {tuple(tensor.shape)} that a recomputed block uses"
                raise changed_in_place(what, tensor._version, version)
        for held, name, tensor in self._named:
            now = held.get(name)
            # Sharded parameters are other objects while they are whole.
            if now is not tensor and type(tensor) in _PLAIN and type(now) in _PLAIN:
                raise RuntimeError(
                    f"{name!r} of shape {tuple(tensor.shape)}, which a recomputed block uses, was "
                    "replaced by another tensor before its backward; keep it until then, or do "
                    "not run that layer by act.block()"
                )
        with self._modes_as_they_were():
            return function()

    @contextmanager
    def _modes_as_they_were(self) -> Iterator[None]:
        changed = [
            (part, part.training)
            for part, mode in self._modes.values()
            if part.training is not mode
        ]
        for part, now in changed:
            part.training = not now
        try:
            yield
        finally:
            for part, now in changed:
                part.training = now
