"""How much memory one piece of a training step needs at its worst moment, exactly.

On a GPU the allocator knows. On a CPU the process's size does not tell (the heap keeps and reuses
pages), so PyTorch's profiler writes down every allocation and release, and the curve of live bytes
is rebuilt from them. That costs time: measure one step, and leave it out of the timings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import offload

__all__ = ["StepMemory", "process_peak_bytes", "resident_bytes", "worst_live_bytes"]

_CPU = torch.device("cpu")


def worst_live_bytes(changes: Iterable[int]) -> int:
    """Return the highest sum that `changes` (bytes; negative when freed) ever reach from 0."""
    return max(accumulate(changes, initial=0))


def process_peak_bytes() -> int:
    """Return the process's high-water mark so far: everything in it, not only tensors."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(found[1]) * 1024 if found else 0


def resident_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the size of what stays between steps: parameters, gradients, buffers, their state."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    state = [value for each in optimizer.state.values() for value in each.values()]
    native_bytes = optimizer.memory_bytes() if isinstance(optimizer, offload.AdamW) else 0
    held = [*parameters, *gradients, *model.buffers(), *state]
    return native_bytes + sum(each.nbytes for each in held if isinstance(each, torch.Tensor))


class StepMemory:
    """Measures the block of a `with`: afterwards `peak_bytes` is its worst moment above its start.

    Counts tensors on `device`. On a CPU it sees what the thread that entered it allocates, and a
    backward runs in the thread that calls it; memory that is not torch's (native buffers, numpy)
    must be added by whoever knows of it. One block at a time.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self.device = device
        self.peak_bytes = 0
        self._start_bytes = 0
        self._profiler: profile | None = None

    def __enter__(self) -> StepMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start_bytes = torch.cuda.memory_allocated(self.device)
            return self
        # Without this the profiler's library writes two lines of its own to stderr.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profiler = profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False
        )
        self._profiler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profiler is None:
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._start_bytes
            return
        self._profiler.stop()
        recorded: Any = self._profiler.profiler
        self._profiler = None
        changes = [
            event for event in recorded.kineto_results.events() if event.name() == "[memory]"
        ]
        changes.sort(key=lambda event: event.start_ns())
        self.peak_bytes = worst_live_bytes(event.nbytes() for event in changes)
