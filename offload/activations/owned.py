"""What belongs to the modules of a forward: parameters and buffers, which stay where they are."""

from __future__ import annotations

import torch

from offload.activations.identity import operator_number, root_of, weak_storage
from offload.native import HeldKeys

__all__ = ["Owned"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Owned:
    """The parameters and buffers of modules that have run. `weak` holds references to storages."""

    def __init__(self, weak: HeldKeys, *, recast: bool) -> None:
        self.kinds: dict[int, str] = {}
        """Of storages, by key: `parameter` or `buffer`."""
        self._weak = weak
        self._recast = recast
        self._modules: set[int] = set()
        # Held, so that no other tensor can take a noted one's id.
        self._noted: dict[int, tuple[torch.Tensor, int, int]] = {}

    def clear(self) -> None:
        """Forget all of them."""
        self.kinds.clear()
        self._modules.clear()
        self._noted.clear()

    def note_module(self, module: torch.nn.Module) -> None:
        """Take in that `module` is about to run: whose its parameters and buffers are."""
        for buffer in module._buffers.values():
            if buffer is not None:
                self._note(buffer, "buffer")
        if id(module) in self._modules:
            return
        # With the whole tree, since a module may use its children's parameters without calling
        # them.
        number = operator_number()
        self._modules.update(id(part) for part in module.modules())
        for parameter in module.parameters():
            self._note(parameter, "parameter")
            if self._recast:
                self._noted.setdefault(id(parameter), (parameter, parameter._version, number))

    def _note(self, tensor: torch.Tensor, kind: str) -> None:
        # Others may have no storage to ask for: lazy ones, sparse ones, wrappers.
        if tensor.__class__ not in _PLAIN or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.kinds:
            self.kinds[key] = kind
            self._weak.append(weak_storage(storage))  # no other storage takes the key

    def unchanged_since_cast(self, parameter: torch.Tensor, tensor: torch.Tensor) -> bool:
        """Say whether `parameter` is as it was when `tensor` was cast from it.

        That is certain only of a cast made after the parameter's version was noted, while that
        version stands: autocast hands out stale casts after an optimizer step inside its region.
        """
        noted = self._noted.get(id(parameter))
        if noted is None or parameter._version != noted[1]:
            return False
        cast = root_of(tensor)
        assert cast.grad_fn is not None
        return cast.grad_fn._sequence_nr() >= noted[2]
