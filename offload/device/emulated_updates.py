"""An emulated device that updates states: real arithmetic, on a clock of its own.

Every queue is a thread. How long something takes is not how long this machine took for it: a
queue's clock moves on by what it is told, and its thread sleeps until then, so that threads which
wake up late add nothing. What a missing order would break on a GPU breaks here as well: memory that
has not arrived holds poison.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from offload.device.link import Moment
from offload.device.updates import QUEUES, Arrays, UpdateDevice
from offload.native import AdamSettings, ThreadPool, adam_update, plain_sum, squared_norm

__all__ = ["EmulatedRates", "EmulatedUpdates"]

_POISON = float("nan")
# A link is given to its queues in turns of this many seconds.
_TURN_S = 0.001
_DIRECTION = {"states in": 1, "parameters": 1, "states out": 0, "gradients": 0}


@dataclass(frozen=True, kw_only=True)
class EmulatedRates:
    """What an emulated device and its host do in a second.

    `jitter`: the largest part by which a task takes more or less, drawn from `seed`. `memory_bytes`
    is what the device says it has left.
    """

    device_params_per_s: float = math.inf
    host_params_per_s: float = math.inf
    to_device_bytes_per_s: float = math.inf
    to_host_bytes_per_s: float = math.inf
    jitter: float = 0.0
    seed: int = 0
    memory_bytes: int = 1 << 62


class _Wire:
    """One direction of the link, which the queues of that direction share."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def carry(self, begin_s: float, nbytes: float) -> float:
        """Return when `nbytes` that are there at `begin_s` have been carried, having waited."""
        if self._bytes_per_s == math.inf:
            return begin_s
        turn = self._bytes_per_s * _TURN_S
        while nbytes > 0:
            with self._lock:
                begin_s = max(begin_s, self._free_s) + min(nbytes, turn) / self._bytes_per_s
                self._free_s = begin_s
            nbytes -= turn
            _sleep_until(begin_s)
        return begin_s


def _sleep_until(end_s: float) -> None:
    left_s = end_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)


class _Work:
    """Something that was asked for; the moment at which it has been done."""

    def __init__(
        self,
        action: Callable[[], None],
        amount: float,
        factor: float,
        after: Sequence[Moment],
        target: torch.Tensor | None = None,
    ) -> None:
        self.action: Callable[[], None] | None = action
        self.target = target
        self.amount = amount
        self.factor = factor
        self.after = tuple(after)
        self.asked_s = time.perf_counter()
        self.end_s = math.inf
        self.error: BaseException | None = None
        self._done = threading.Event()

    def run(self, free_s: float, take: Callable[[float, float], float]) -> float:
        """Do it on a queue that is free from `free_s` on; returns the seconds it took."""
        begin_s = max(free_s, self.asked_s)
        try:
            for moment in self.after:
                moment.synchronize()
                begin_s = max(begin_s, getattr(moment, "end_s", 0.0))
            if self.target is not None:
                self.target.fill_(_POISON)
            end_s = take(begin_s, self.amount * self.factor)
            assert self.action is not None
            self.action()
            self.end_s = end_s
        except BaseException as error:
            self.error, self.end_s = error, begin_s
        self.action, self.target, self.after = None, None, ()
        self._done.set()
        return self.end_s - begin_s

    def query(self) -> bool:
        return self._done.is_set()

    def synchronize(self) -> None:
        self._done.wait()
        if self.error is not None:
            raise self.error


class _Queue:
    """A thread that does one thing after the other."""

    def __init__(self, name: str, take: Callable[[float, float], float]) -> None:
        self._take = take
        self._waiting: SimpleQueue[_Work | None] = SimpleQueue()
        self.done = (0.0, 0.0)
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"emulated {name}")
        self._thread.start()

    def add(self, work: _Work) -> _Work:
        self._waiting.put(work)
        return work

    def _run(self) -> None:
        free_s = 0.0
        while (work := self._waiting.get()) is not None:
            took_s = work.run(free_s, self._take)
            free_s = work.end_s
            amount, seconds = self.done
            self.done = amount + work.amount, seconds + took_s

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()


class _Now:
    """A moment that has come."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


class EmulatedUpdates(UpdateDevice):
    """Treats CPU tensors as if they lay on a device with these rates."""

    def __init__(self, rates: EmulatedRates | None = None) -> None:
        super().__init__(torch.device("cpu"))
        self._rates = rates = rates or EmulatedRates()
        self._chance = random.Random(rates.seed)
        self._pool = ThreadPool(1)
        wires = _Wire(rates.to_host_bytes_per_s), _Wire(rates.to_device_bytes_per_s)

        def compute(begin_s: float, params: float) -> float:
            end_s = begin_s + params / rates.device_params_per_s
            _sleep_until(end_s)
            return end_s

        self._queues = {
            name: _Queue(name, wires[_DIRECTION[name]].carry if name in _DIRECTION else compute)
            for name in QUEUES
        }
        self._host = (0.0, 0.0)
        self.pinned: dict[int, int] = {}

    def _factor(self) -> float:
        return 1 + self._rates.jitter * self._chance.uniform(-1, 1)

    def free_bytes(self) -> int:
        """Return what was said; without end by default."""
        return self._rates.memory_bytes

    def ready(self) -> Moment:
        """Return the present: whatever was computed has been."""
        return _Now()

    def copy(
        self, queue: str, source: torch.Tensor, target: torch.Tensor, after: Sequence[Moment]
    ) -> Moment:
        """Copy later; `target` holds poison from when it may be written until it has been."""

        def action() -> None:
            target.copy_(source)

        work = _Work(action, source.nbytes, self._factor(), after, target)
        return self._queues[queue].add(work)

    def update(
        self,
        settings: AdamSettings,
        step: int,
        arrays: Arrays,
        *,
        clip: float,
        after: Sequence[Moment],
    ) -> Moment:
        """Update later, with the host's arithmetic, which has the device's bits."""

        def action() -> None:
            adam_update(self._pool, settings, step, clip=clip, **vars(arrays))

        work = _Work(action, arrays.grad.numel(), self._factor(), after)
        return self._queues["device"].add(work)

    def update_on_host(
        self, pool: ThreadPool, settings: AdamSettings, step: int, arrays: Arrays, *, clip: float
    ) -> None:
        """Update now, as slowly as the host is said to be."""
        begin_s = time.perf_counter()
        super().update_on_host(pool, settings, step, arrays, clip=clip)
        count = arrays.grad.numel()
        _sleep_until(begin_s + self._factor() * count / self._rates.host_params_per_s)
        params, seconds = self._host
        self._host = params + count, seconds + time.perf_counter() - begin_s

    def squared_norms(self, pool: ThreadPool, values: Sequence[torch.Tensor]) -> list[float]:
        """Return the host's, which has the device's bits."""
        return [squared_norm(pool, each) for each in values]

    def plain_sums(self, pool: ThreadPool, values: Sequence[torch.Tensor]) -> list[float]:
        """Return the host's, which has the device's bits."""
        return [plain_sum(pool, each) for each in values]

    def hold(self, moment: Moment) -> None:
        """Wait, as the computation would."""
        moment.synchronize()

    def done(self) -> Mapping[str, tuple[float, float]]:
        """Return what each queue has done, and the host."""
        return {**{name: queue.done for name, queue in self._queues.items()}, "host": self._host}

    def pin(self, address: int, nbytes: int) -> bool:
        """Remember the memory."""
        self.pinned[address] = nbytes
        return True

    def unpin(self, address: int) -> None:
        """Forget it."""
        del self.pinned[address]

    def close(self) -> None:
        """Wait for all that was asked for."""
        for queue in self._queues.values():
            queue.close()
