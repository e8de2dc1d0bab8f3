"""The direct way of the ssd tier: a device's bytes to its files without passing host memory.

Nothing is staged, and nothing is verified: the checksums of `Spill` are made in host memory.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import torch

from offload.device import DirectFile, Moment
from offload.native import Extent, Spill

__all__ = ["DirectExtent", "DirectTransfer", "DirectWay"]


class DirectTransfer:
    """A transfer that a thread makes; the moment at which it has been made."""

    def __init__(self, lane: _Lane, future: Future[None]) -> None:
        self._lane, self._future = lane, future

    def query(self) -> bool:
        """Say whether it has ended, well or not."""
        return self._future.done()

    def synchronize(self) -> None:
        """Return when it has been made; raises OSError when it failed."""
        self._future.result()

    def hold(self) -> None:
        """Keep the calling thread, and what it would compute next, until then; see `wait_s`."""
        begin_s = time.perf_counter()
        try:
            self.synchronize()
        finally:
            self._lane.wait_s += time.perf_counter() - begin_s


class _Lane:
    """The transfers of one direction, one after the other: kvikio splits each over its threads."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.nbytes = 0
        self.busy_s = 0.0
        self.wait_s = 0.0
        """For how long the computation was kept."""
        self.error: BaseException | None = None

    def add(
        self,
        after: Sequence[Moment],
        transfer: Callable[[torch.Tensor, int], int],
        tensor: torch.Tensor,
        extent: Extent,
    ) -> DirectTransfer:
        """Move `tensor` to or from the space of `extent`, which is held meanwhile."""
        future = self._thread.submit(self._run, after, transfer, tensor, extent)
        return DirectTransfer(self, future)

    def _run(
        self,
        after: Sequence[Moment],
        transfer: Callable[[torch.Tensor, int], int],
        tensor: torch.Tensor,
        extent: Extent,
    ) -> None:
        try:
            for moment in after:
                moment.synchronize()
            begin_s = time.perf_counter()
            done = 0
            while done < tensor.nbytes:
                moved = transfer(tensor[done:], extent.offset + done)
                if moved <= 0:
                    raise OSError(
                        errno.EIO,
                        f"a direct transfer of {tensor.nbytes} bytes at {extent.offset} ended "
                        f"after {done}",
                    )
                done += moved
            self.nbytes += done
            self.busy_s += time.perf_counter() - begin_s
        except BaseException as error:
            if self.error is None:
                # Told again without its frames, which hold the tensor and the space.
                self.error = RuntimeError(f"{type(error).__name__}: {error}")
                if isinstance(error, OSError):
                    self.error = OSError(error.errno, error.strerror or str(error), error.filename)
            raise

    def drain(self) -> None:
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        self._thread.shutdown()


class DirectExtent:
    """Space in a file, for bytes that a device writes there itself. Dropping it frees the space."""

    __slots__ = ("_extent", "_file", "_way")

    ready = True

    def __init__(self, way: DirectWay, file: DirectFile, extent: Extent) -> None:
        self._way, self._file, self._extent = way, file, extent

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self._extent.nbytes

    def prefetch(self) -> bool:
        """Do nothing: reading needs the device's memory."""
        return True

    def write_from(self, source: torch.Tensor, after: Sequence[Moment]) -> DirectTransfer:
        """Write `source` after those moments. It must stay as it is until the transfer ends."""
        return self._way.writes.add(after, self._file.write, source, self._extent)

    def read_into(self, target: torch.Tensor, after: Sequence[Moment]) -> DirectTransfer:
        """Read into `target` after those moments."""
        return self._way.reads.add(after, self._file.read, target, self._extent)


class DirectWay:
    """The files of one instance's directories, as a device sees them."""

    def __init__(self, files: Mapping[Spill, DirectFile]) -> None:
        self._files = dict(files)
        self.written = dict.fromkeys(files, 0)
        """Bytes that each directory's file was reserved for."""
        self.writes = _Lane("offload direct writes")
        self.reads = _Lane("offload direct reads")

    def reserve(self, spill: Spill, nbytes: int) -> DirectExtent | None:
        """Return space in a directory's file; None when it has none."""
        extent = spill.reserve(nbytes)
        if extent is None:
            return None
        self.written[spill] += nbytes
        return DirectExtent(self, self._files[spill], extent)

    def counters(self) -> dict[str, int | float]:
        """Return what is added to the counters of the spills."""
        return {
            "write_bytes": self.writes.nbytes,
            "read_bytes": self.reads.nbytes,
            "reloaded_bytes": self.reads.nbytes,
            "write_wait_s": self.writes.wait_s,
            "read_wait_s": self.reads.wait_s,
        }

    def drain(self) -> None:
        """Wait until nothing is under way: reads may wait for writes."""
        self.writes.drain()
        self.reads.drain()

    def raise_error(self) -> None:
        """Raise the error of the first write that failed: its tensor may be lost."""
        if self.writes.error is not None:
            raise self.writes.error

    def close(self) -> None:
        """Wait for what is under way, and let go of the files."""
        with ExitStack() as stack:  # all of them, the last one first
            for file in self._files.values():
                stack.callback(file.close)
            stack.callback(self.reads.close)
            stack.callback(self.writes.close)
