"""What a run may change without any version counter telling: bytes of buffers, random numbers."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.nn import Module

from offload.device import default_generators
from offload.native import crc32c

__all__ = ["Unversioned"]


class Unversioned:
    """What was there before a run, of the modules that it calls or reaches; compare it after.

    `learning`: also buffers on a device, which waits for it, and what others may change as well.
    """

    def __init__(self, generators: Iterable[torch.Generator], *, learning: bool) -> None:
        self._learning = learning
        self._seen: set[int] = set()
        self._before: list[tuple[Callable[[], Any], Any]] = []
        if learning:  # later on another thread may well draw from them, to bring the next batch say
            self._note(random.getstate)
            numpy = sys.modules.get("numpy")
            if numpy is not None:
                self._note(lambda: pickle.dumps(numpy.random.get_state(legacy=False)))
        for generator in generators:
            self._note_generator(generator)

    def _note(self, look: Callable[[], Any]) -> None:
        self._before.append((look, look()))

    def _note_generator(self, generator: torch.Generator) -> None:
        defaults = default_generators()
        # A checkpoint has those go on from where they were.
        if id(generator) not in self._seen and not any(generator is one for one in defaults):
            self._seen.add(id(generator))
            self._note(lambda: bytes(generator.get_state().numpy()))

    def note_module(self, module: Module, *, merely_reached: bool = False) -> None:
        """Take in what `module`, which is no part of those before, has before it runs."""
        if id(module) in self._seen or (merely_reached and not self._learning):
            return
        self._seen.add(id(module))
        for value in list(vars(module).values()):
            if isinstance(value, torch.Generator):
                self._note_generator(value)
        for buffer in module._buffers.values():
            if type(buffer) is torch.Tensor and (buffer.is_cpu or self._learning):
                self._note(partial(_bits_of, buffer))

    def same(self) -> bool:
        """Say whether all of it is as it was."""
        return all(look() == before for look, before in self._before)


def _bits_of(tensor: torch.Tensor) -> Any:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return None
    if tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        return crc32c(tensor.data_ptr(), tensor.nbytes)
    whole = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    return crc32c(whole.data_ptr(), whole.nbytes)
