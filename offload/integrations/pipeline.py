"""The forwards of a pipeline's rank, and the order of their backwards, known beforehand."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from offload.session import Session
from perfmodel.schedules.pipeline import Pass, passes_of

__all__ = ["Pipeline"]

_log = logging.getLogger(__name__)
Key = tuple[int, int]
"""A chunk and a micro-batch."""


class Pipeline:
    """Follows one rank's schedule, and tells its `session` whose backward comes next.

    Of a forward that is followed by its own backward nothing leaves, where a rank has several
    stages beside it: it holds fewer micro-batches than theirs. Of any other one reading begins when
    the backward before it does. A schedule that does something else than expected is followed
    without being told, which costs waiting and never a wrong number.
    """

    def __init__(self, session: Session, chunks: int = 1) -> None:
        self.session, self.chunks = session, chunks
        self._passes: deque[Pass] = deque()
        self._keeps = self._inside = self._warned = False
        self._open: dict[Key, Any] = {}
        self._outputs: dict[Key, Any] = {}
        self._counts: dict[int, int] = {}

    @property
    def begins(self) -> bool:
        """Whether nothing is under way: the next forward is a step's first."""
        return not self._open and not self._passes

    def expect(
        self, *, stages: int, rank: int, micro_batches: int | None, group: int | None
    ) -> None:
        """Say what this step is to do; `micro_batches` None: that is not known."""
        self._counts = {}
        self._keeps = stages > 1
        if micro_batches is not None:
            self._passes = deque(
                passes_of(
                    stages=stages,
                    rank=rank,
                    micro_batches=micro_batches,
                    chunks=self.chunks,
                    group=group,
                )
            )

    def meet(self, *_: Any) -> None:
        """Warn, once, of a forward that nobody wrapped: of that nothing moves."""
        act = self.session.activations
        wanted = torch.is_grad_enabled() and act is not None and not act.closed
        if wanted and not self._inside and not self._warned:
            self._warned = True
            warnings.warn(
                "a forward outside of wrap_forward_step: nothing of it moves, whatever the plan "
                "says; give the schedule the forward step that wrap_forward_step returns",
                RuntimeWarning,
                stacklevel=2,
            )

    @contextmanager
    def forward(self, chunk: int) -> Iterator[Key]:
        """Run a chunk's next forward inside; gives its key."""
        number = self._counts.get(chunk, 0)
        self._counts[chunk] = number + 1
        key = chunk, number
        self._came(Pass(True, *key))
        act = self.session.activations
        assert act is not None
        self._open[key] = forward = act.forward()
        self._inside = True
        try:
            with forward:
                if self._keeps and self._next_backward(only_next=True) == key:
                    act.hint(next_backward=forward)
                yield key
        except BaseException:
            del self._open[key]
            raise
        finally:
            self._inside = False

    def follow(self, key: Key, output: Any) -> None:
        """Have the backward of a forward's output say when it begins."""
        if not isinstance(output, torch.Tensor) or not output.requires_grad:
            self._open.pop(key, None)
            return
        # One whose backward never comes is over when its output is gone.
        self._outputs[key] = weakref.ref(output, lambda gone: self._lost(key, gone))
        hooked: Any = output  # whose hooks are not typed in torch
        hooked.register_hook(lambda _grad: self._begun(key))
        self._read_for(self._next_backward(only_next=True))

    def _lost(self, key: Key, gone: Any) -> None:
        if self._outputs.get(key) is gone:
            del self._outputs[key]
            self._open.pop(key, None)

    def _begun(self, key: Key) -> None:
        """Note that a backward has begun; reading for the next one begins."""
        self._open.pop(key, None)
        self._outputs.pop(key, None)
        self._came(Pass(False, *key))
        self._read_for(self._next_backward())

    def _read_for(self, key: Key | None) -> None:
        forward = None if key is None else self._open.get(key)
        act = self.session.activations
        if forward is not None and forward.ended and act is not None and not act.closed:
            act.hint(next_backward=forward)

    def _came(self, found: Pass) -> None:
        """Go on in what was expected; forget it where it is not what comes."""
        if not self._passes:
            return
        expected = self._passes.popleft()
        if expected != found:
            _log.info("a schedule of its own: %s comes, and not %s", found, expected)
            self._passes.clear()

    def _next_backward(self, *, only_next: bool = False) -> Key | None:
        """Return whose backward is the next to come; `only_next`: with no forward before it."""
        for each in self._passes:
            if not each.is_forward:
                return each.chunk, each.micro_batch
            if only_next:
                return None
        return None
