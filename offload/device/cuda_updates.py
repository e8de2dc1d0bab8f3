"""A GPU that updates states, and the copies beside it: a stream for each queue."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from offload.device.cuda import new_event, new_stream, pin_host_memory, unpin_host_memory
from offload.device.kernels import Kernels
from offload.device.link import Moment
from offload.device.updates import QUEUES, Arrays, UpdateDevice
from offload.native import NORM_BLOCK, AdamSettings, ThreadPool, sum_of_blocks

__all__ = ["CudaUpdates"]

# Of a queue, tasks whose times are not asked for yet; beyond, they are added up.
_MOST_UNTIMED = 256


class CudaUpdates(UpdateDevice):
    """One GPU. Nothing here waits for the whole device.

    Raises ImportError where the kernels were not built.
    """

    def __init__(self, device: torch.device, kernels: Kernels | None = None) -> None:
        super().__init__(device)
        self._kernels = Kernels() if kernels is None else kernels
        self._streams = {name: new_stream(device) for name in QUEUES}
        self._untimed: dict[str, deque[tuple[Any, Any, float]]] = {name: deque() for name in QUEUES}
        self._sums = dict.fromkeys((*QUEUES, "host"), (0.0, 0.0))

    def free_bytes(self) -> int:
        """Return what CUDA has left, and what the caching allocator holds unused."""
        free, _ = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        return int(free + reserved - torch.cuda.memory_allocated(self.device))

    def ready(self) -> Moment:
        """Return an event on the current stream."""
        moment: Moment = self._record(torch.cuda.current_stream(self.device))
        return moment

    def _record(self, stream: Any) -> Any:
        event = new_event()
        event.record(stream)
        return event

    def _begin(self, queue: str, after: Sequence[Moment]) -> tuple[Any, Any]:
        stream = self._streams[queue]
        for moment in after:
            stream.wait_event(moment)
        return stream, self._record(stream)

    def _end(self, queue: str, begin: Any, amount: float) -> Moment:
        end: Moment = self._record(self._streams[queue])
        untimed = self._untimed[queue]
        untimed.append((begin, end, amount))
        if len(untimed) > _MOST_UNTIMED:
            self._add_up(queue)
        return end

    def copy(
        self, queue: str, source: torch.Tensor, target: torch.Tensor, after: Sequence[Moment]
    ) -> Moment:
        """Copy on the queue's stream; what is on the host must be pinned, or this waits."""
        stream, begin = self._begin(queue, after)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return self._end(queue, begin, source.nbytes)

    def update(
        self,
        settings: AdamSettings,
        step: int,
        arrays: Arrays,
        *,
        clip: float,
        after: Sequence[Moment],
    ) -> Moment:
        """Update by the kernel of csrc/cuda. Raises RuntimeError where CUDA refuses."""
        stream, begin = self._begin("device", after)
        with torch.cuda.device(self.device):
            self._kernels.update(settings, step, arrays, clip=clip, stream=stream.cuda_stream)
        return self._end("device", begin, arrays.grad.numel())

    def update_on_host(
        self, pool: ThreadPool, settings: AdamSettings, step: int, arrays: Arrays, *, clip: float
    ) -> None:
        """Update now, and note how long it took."""
        begin_s = time.perf_counter()
        super().update_on_host(pool, settings, step, arrays, clip=clip)
        params, seconds = self._sums["host"]
        took_s = time.perf_counter() - begin_s
        self._sums["host"] = params + arrays.grad.numel(), seconds + took_s

    def squared_norms(self, pool: ThreadPool, values: Sequence[torch.Tensor]) -> list[float]:
        """Sum the blocks on the current stream, and wait once for all of them."""
        return self._totals(values, squares=True)

    def plain_sums(self, pool: ThreadPool, values: Sequence[torch.Tensor]) -> list[float]:
        """Do the same without squaring."""
        return self._totals(values, squares=False)

    def _totals(self, values: Sequence[torch.Tensor], *, squares: bool) -> list[float]:
        counts = [-(-each.numel() // NORM_BLOCK) for each in values]
        sums = torch.zeros(sum(counts), dtype=torch.float64, device=self.device)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        ends = [*accumulate(counts)]
        with torch.cuda.device(self.device):
            for each, count, end in zip(values, counts, ends, strict=True):
                of_each = sums[end - count : end]
                self._kernels.block_sums(each, of_each, squares=squares, stream=stream)
        on_host: list[float] = sums.tolist()
        return [
            sum_of_blocks(on_host[end - count : end])
            for count, end in zip(counts, ends, strict=True)
        ]

    def hold(self, moment: Moment) -> None:
        """Have the current stream wait for an event."""
        stream: Any = torch.cuda.current_stream(self.device)
        stream.wait_event(moment)

    def done(self) -> Mapping[str, tuple[float, float]]:
        """Return what each stream has done by now, and the host."""
        for queue in QUEUES:
            self._add_up(queue)
        return dict(self._sums)

    def _add_up(self, queue: str) -> None:
        untimed = self._untimed[queue]
        while untimed and untimed[0][1].query():
            begin, end, amount = untimed.popleft()
            total, seconds = self._sums[queue]
            self._sums[queue] = total + amount, seconds + begin.elapsed_time(end) * 1e-3

    def pin(self, address: int, nbytes: int) -> bool:
        """Register host memory with CUDA."""
        return pin_host_memory(self.device, address, nbytes) == 0

    def unpin(self, address: int) -> None:
        """Undo the registration."""
        unpin_host_memory(address)

    def close(self) -> None:
        """Wait for all streams."""
        for stream in self._streams.values():
            stream.synchronize()
