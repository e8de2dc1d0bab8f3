"""Whether a block may be run again in the backward: what it uses must be as it was."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch.nn import Module, Parameter

from offload.activations.saved import changed_in_place
from offload.activations.unversioned import Unversioned

__all__ = ["Mark", "Marks", "Reached", "Used", "reached_by"]

# Of a block's graph; one that reaches far outside of its arguments is not followed to its end.
_MOST_NODES = 4096
_PLAIN = (torch.Tensor, Parameter)
_FEW_MODULES = 1024
# Attributes of modules that are a value. None is none, but a cache that is not filled yet, say.
_VALUES = (int, float, complex, str, bytes)

Mark = tuple[object, ...]
"""What a block is, as far as can be told before it runs: its modules and their modes."""


class Reached(NamedTuple):
    """What a block consists of, and what it can merely reach."""

    own: list[Module]
    """Itself, and its arguments."""
    near: list[Module]
    """What a method is bound to, or a function closes over or has for a default: maybe the whole
    model that the block is a part of."""
    generators: list[torch.Generator]
    """Of either, but for those that modules have."""


def reached_by(function: object, args: Iterable[object]) -> Reached:
    """Return what a block that is about to run can be seen to use."""
    found = Reached([], [], [])
    todo, seen, own = [*args, function], set[int](), {id(arg) for arg in (*args, function)}
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Module):
            (found.own if id(one) in own else found.near).append(one)
        elif isinstance(one, torch.Generator):
            found.generators.append(one)
        elif isinstance(one, functools.partial):
            given = one.func, *one.args, *one.keywords.values()
            own |= {id(part) for part in given}
            todo += given
        elif isinstance(one, MethodType):
            if one.__name__ == "forward":
                own.add(id(one.__self__))
            todo += [one.__self__, one.__func__]
        elif isinstance(one, FunctionType):
            todo += [cell.cell_contents for cell in one.__closure__ or () if _is_filled(cell)]
            todo += [*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
    return found


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
        own, near, _ = reached_by(function, args)
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
    graph. What of them no version tells is looked at before and after. What else a function reaches
    (global names, Python's own objects) is not seen.
    """

    def __init__(
        self, args: Iterable[torch.Tensor], reached: Reached, *, learning: bool = True
    ) -> None:
        own, near, generators = reached
        self._versions: dict[int, tuple[torch.Tensor, int]] = {}
        # Parameters and buffers where their modules have them.
        self._named: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        # The same of buffers that the run may reach, with their versions, until it has ended.
        self._reachable: list[tuple[dict[str, Any], str, torch.Tensor, int]] = []
        # Of modules before they ran: whether they are training, how often they were called, say.
        self._attributes: dict[int, tuple[Module, dict[str, Any]]] = {}
        self._args = list(args)
        self._unversioned: Unversioned | None = Unversioned(generators, learning=learning)
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
            if self._unversioned is not None:
                self._unversioned.note_module(part, merely_reached=True)
            for name, buffer in part._buffers.items():
                if buffer is not None and not buffer.is_inference():
                    self._reachable.append((part._buffers, name, buffer, buffer._version))

    def note_module(self, module: Module) -> None:
        """Take in that `module` is about to run."""
        for part in module.modules() if id(module) not in self._attributes else ():
            if id(part) in self._attributes:
                continue
            self._attributes[id(part)] = part, _attributes_of(part)
            if self._unversioned is not None:
                self._unversioned.note_module(part)
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        self._note(tensor)
                        self._named.append((held, name, tensor))
            # Their buffers may be on a device, where bytes are not compared in every step.
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
        same &= self._unversioned is None or self._unversioned.same()
        self._unversioned = None
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
        """Return `function()`, with the attributes that modules had before the block first ran.

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
        with self._attributes_as_they_were():
            return function()

    @contextmanager
    def _attributes_as_they_were(self) -> Iterator[None]:
        changed = []
        for part, before in self._attributes.values():
            now = vars(part)
            if any(now.get(name) is not value for name, value in before.items()):
                changed.append((now, {name: now[name] for name in before if name in now}))
                now.update(before)
        try:
            yield
        finally:
            for now, after in changed:
                now.update(after)


def _attributes_of(module: Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, _VALUES)}
