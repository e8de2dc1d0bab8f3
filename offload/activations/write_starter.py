"""Has what a device has copied to staging written from there."""

from __future__ import annotations

import contextlib
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

from offload.device import Moment
from offload.native import Buffer, Extent
from offload.tiers import HostExtent

if TYPE_CHECKING:
    from offload.activations.region import Region

__all__ = ["WriteStarter"]

_Followed = tuple["Region", Extent | HostExtent, Buffer, Moment]


class WriteStarter:
    """Has each extent written once its bytes have come from the device, in a thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Followed | threading.Event | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = False
        self.error: BaseException | None = None

    def follow(
        self, region: Region, extent: Extent | HostExtent, buffer: Buffer, copied: Moment
    ) -> None:
        """Begin to write `extent` after `copied`, unless `region` has let go of it by then."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="offload writes")
            self._thread.start()
        self._queue.put((region, extent, buffer, copied))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                self._start(*item)
            del item

    def _start(
        self, region: Region, extent: Extent | HostExtent, _buffer: Buffer, copied: Moment
    ) -> None:
        # The buffer is held until the copy has been made, whatever becomes of the extent.
        try:
            copied.synchronize()
            if region.extent is extent and not self._closing:
                extent.start_write()
        except BaseException as error:
            self.error = self.error or error
            # It will never be written, and nobody shall wait until it is.
            with contextlib.suppress(RuntimeError):
                extent.prefetch()

    def drain(self) -> None:
        """Wait until all that was followed so far has been dealt with."""
        if self._thread is not None:
            passed = threading.Event()
            self._queue.put(passed)
            passed.wait()

    def close(self) -> None:
        """Wait for the copies under way; begin no more writes."""
        self._closing = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
