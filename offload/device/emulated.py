"""A device made of host memory, for machines without a GPU: late copies, the same bits.

Two threads copy, one for each direction, as slowly as they are told. What a missing order would
break on a GPU breaks here as well: memory that has not arrived holds poison, and a copy from memory
that was freed too early is an error.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch

from offload.device.direct import DirectFile
from offload.device.link import DeviceLink, Moment
from offload.native import Buffer, close_in_children, keep_in_children, tensor_over

__all__ = ["EmulatedLink"]

_POISON = 0xA5
# Untyped in torch: see `activations.identity`.
_weak_storage: Any = torch.UntypedStorage._weak_ref
_storage_of: Any = torch.UntypedStorage._new_with_weak_ptr
_release: Any = torch.UntypedStorage._free_weak_ref


class _Copy:
    """A copy that was asked for; the moment at which it has been made."""

    def __init__(self, copy: Callable[[], None], nbytes: int, after: Sequence[Moment]) -> None:
        self.copy: Callable[[], None] | None = copy
        self.nbytes = nbytes
        self.after = tuple(after)
        self.error: BaseException | None = None
        self.busy_s = 0.0
        self._made = threading.Event()

    def run(self, delay_s: float) -> None:
        try:
            assert self.copy is not None
            for moment in self.after:
                moment.synchronize()
            begin_s = time.perf_counter()
            time.sleep(delay_s)
            self.copy()
            self.busy_s = time.perf_counter() - begin_s
        except BaseException as error:
            self.error = error
        self.copy, self.after = None, ()
        self._made.set()

    def query(self) -> bool:
        return self._made.is_set()

    def synchronize(self) -> None:
        self._made.wait()
        if self.error is not None:
            raise self.error


class _Lane:
    """The copies of one direction, one after the other."""

    def __init__(self, bytes_per_s: float, latency_s: float) -> None:
        self._bytes_per_s, self._latency_s = bytes_per_s, latency_s
        self._queue: SimpleQueue[_Copy | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.copied = (0.0, 0.0)

    def add(self, copy: _Copy) -> _Copy:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="emulated copies")
            self._thread.start()
        self._queue.put(copy)
        return copy

    def _run(self) -> None:
        while (copy := self._queue.get()) is not None:
            copy.run(self._latency_s + copy.nbytes / self._bytes_per_s)
            nbytes, busy_s = self.copied
            self.copied = nbytes + copy.nbytes, busy_s + copy.busy_s

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None


class _Mark:
    """A moment of the computation, which is done as soon as it is asked for."""

    def __init__(self) -> None:
        self.time_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


class EmulatedFile:
    """A file that the emulated device reaches as a GPU would."""

    def __init__(self, descriptor: int) -> None:
        # Opened anew, as kvikio does: a file without a name has one there.
        self._descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
        close_in_children(self._descriptor)

    def write(self, source: torch.Tensor, offset: int) -> int:
        """Write from memory."""
        return os.pwrite(self._descriptor, source.numpy().data, offset)

    def read(self, target: torch.Tensor, offset: int) -> int:
        """Read to memory, which holds something else until then."""
        target.fill_(_POISON)
        return os.preadv(self._descriptor, [target.numpy().data], offset)

    def close(self) -> None:
        """Give the descriptor back."""
        keep_in_children(self._descriptor)
        os.close(self._descriptor)


class EmulatedLink(DeviceLink):
    """Treats CPU tensors as if they lay on a device with `bytes_per_s` to and from the host."""

    pinned_reason = "emulated"

    def __init__(self, bytes_per_s: float = math.inf, latency_s: float = 0.0) -> None:
        super().__init__(torch.device("cpu"))
        self._out = _Lane(bytes_per_s, latency_s)
        self._in = _Lane(bytes_per_s, latency_s)
        self.pinned: dict[int, int] = {}

    def queue(self) -> int:
        """Return the only queue."""
        return 0

    def main_queue(self) -> int:
        """Return the only queue."""
        return 0

    def require_ready(self) -> None:
        """Accept whatever is computed."""

    def copy_out(self, source: torch.Tensor, target: Buffer, made_on: Any) -> Moment:
        """Copy later, from memory that must still be there."""
        tensor_over(target, torch.uint8).fill_(_POISON)
        storage = source.untyped_storage()
        alive, geometry = _weak_storage(storage), (source.storage_offset(), source.shape)
        device, nbytes = source.device, source.nbytes

        def copy() -> None:
            found = _storage_of(alive)
            _release(alive)
            if found is None or found.nbytes() < geometry[0] + nbytes:
                raise RuntimeError(f"{nbytes} bytes were freed before they were copied out")
            flat = torch.empty(0, dtype=torch.uint8, device=device)
            flat.set_(found, geometry[0], geometry[1], (1,))
            tensor_over(target, torch.uint8).copy_(flat)

        return self._out.add(_Copy(copy, nbytes, ()))

    def copy_in(self, source: Buffer, target: torch.Tensor, after: Sequence[Moment]) -> Moment:
        """Copy later; until then `target` holds poison."""
        target.fill_(_POISON)

        def copy() -> None:
            target.copy_(tensor_over(source, torch.uint8))

        return self._in.add(_Copy(copy, target.nbytes, after))

    def direct_file(self, descriptor: int) -> DirectFile:
        """Open it once more."""
        return EmulatedFile(descriptor)

    def mark(self, queue: Any = None) -> _Mark:
        """Return the present."""
        return _Mark()

    def hold(self, moment: Moment, queue: Any) -> None:
        """Wait, as the computation would."""
        moment.synchronize()

    def used_on(self, tensor: torch.Tensor, queue: Any) -> None:
        """Do nothing: memory here goes when nobody holds it."""

    def leaves(self, tensor: torch.Tensor) -> None:
        """Do nothing: memory here goes when nobody holds it."""

    def elapsed_s(self, begin: Any, end: Any) -> float:
        """Return the seconds between two marks."""
        return float(end.time_s - begin.time_s)

    def transferred(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return bytes and seconds of the copies made, out and in."""
        return self._out.copied, self._in.copied

    def pin(self, address: int, nbytes: int) -> bool:
        """Remember the memory."""
        self.pinned[address] = nbytes
        return True

    def unpin(self, address: int) -> None:
        """Forget it."""
        del self.pinned[address]

    def close(self) -> None:
        """Wait for the copies asked for."""
        self._out.close()
        self._in.close()
