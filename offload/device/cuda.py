"""CUDA devices: copies on two side streams, ordered with the computation by events only."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from offload.device.direct import DirectFile, KvikioFile
from offload.device.link import DeviceLink, Moment
from offload.native import Buffer, tensor_over

__all__ = [
    "CudaLink",
    "device_facts",
    "new_event",
    "new_stream",
    "pin_host_memory",
    "refuse_capture",
    "unpin_host_memory",
]

# Untyped in torch.
_Stream: Any = torch.cuda.Stream
_Event: Any = torch.cuda.Event
_cudart: Any = torch.cuda.cudart
_is_initialized: Any = torch.cuda.is_initialized
# Copies whose times are not asked for yet; beyond, they are added up.
_MOST_UNTIMED = 256
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process


def new_stream(device: torch.device) -> Any:
    """Return a stream beside the computation."""
    return _Stream(device)


def new_event() -> Any:
    """Return an event with a time; who waits for it sleeps, instead of keeping a core busy."""
    return _Event(enable_timing=True, blocking=True)


def pin_host_memory(device: torch.device, address: int, nbytes: int) -> int:
    """Register host memory with CUDA, all of which becomes resident; return 0 or CUDA's error."""
    code = int(_cudart().cudaHostRegister(address, nbytes, _PORTABLE))
    if code:
        _forget_error(device)
    return code


def _forget_error(device: torch.device) -> None:
    # CUDA remembers an error, and whoever launches the next kernel would be told.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


def unpin_host_memory(address: int) -> None:
    """Undo the registration, before the memory goes."""
    if int(_cudart().cudaHostUnregister(address)):
        _forget_error(torch.device("cuda"))


class CudaLink(DeviceLink):
    """One GPU. Nothing here waits for the whole device.

    Where memory that crosses belongs to the stream that computes with it, the caching allocator
    reuses it in that stream's order: nothing need be recorded for another stream, which would hold
    memory for as long as the host runs ahead.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._out = new_stream(device)
        self._in = new_stream(device)
        # Copies whose time is not known yet: begin, end, bytes. One list for each direction.
        self._untimed: tuple[deque[tuple[Any, Any, int]], ...] = (deque(), deque())
        self._sums = [[0.0, 0.0], [0.0, 0.0]]
        self._timing = threading.Lock()

    def queue(self) -> Any:
        """Return the current stream."""
        return torch.cuda.current_stream(self.device)

    def main_queue(self) -> Any:
        """Return the default stream."""
        return torch.cuda.default_stream(self.device)

    def require_ready(self) -> None:
        """Refuse a CUDA graph's capture, which would keep this one copy for ever."""
        refuse_capture()

    def copy_out(self, source: torch.Tensor, target: Buffer, made_on: Any) -> Moment:
        """Copy on the side stream for leaving."""
        for stream in {made_on, self.queue()}:
            self._out.wait_stream(stream)
        with torch.cuda.stream(self._out):
            return self._copy(tensor_over(target, torch.uint8), source, direction=0)

    def copy_in(self, source: Buffer, target: torch.Tensor, after: Sequence[Moment]) -> Moment:
        """Copy on the side stream for coming back."""
        for moment in after:
            self._in.wait_event(moment)
        with torch.cuda.stream(self._in):
            return self._copy(target, tensor_over(source, torch.uint8), direction=1)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, direction: int) -> Moment:
        begin = _Event(enable_timing=True)
        # Whoever waits sleeps, instead of keeping a core busy.
        end: Any = _Event(enable_timing=True, blocking=True)
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        with self._timing:
            self._untimed[direction].append((begin, end, source.nbytes))
        if len(self._untimed[direction]) > _MOST_UNTIMED:
            self.transferred()
        moment: Moment = end
        return moment

    def mark(self, queue: Any = None) -> Any:
        """Return an event on a stream."""
        event = _Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self.device) if queue is None else queue)
        return event

    def hold(self, moment: Moment, queue: Any) -> None:
        """Have a stream wait for an event."""
        queue.wait_event(moment)

    def used_on(self, tensor: torch.Tensor, queue: Any) -> None:
        """Tell the caching allocator."""
        tensor.record_stream(queue)

    def leaves(self, tensor: torch.Tensor) -> None:
        """Tell the caching allocator of the side stream for leaving."""
        tensor.record_stream(self._out)

    def elapsed_s(self, begin: Any, end: Any) -> float:
        """Return the seconds between two events."""
        begin.synchronize()  # they may be of two streams
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def transferred(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return bytes and seconds of the copies that have ended, out and in."""
        with self._timing:
            for untimed, sums in zip(self._untimed, self._sums, strict=True):
                while untimed and untimed[0][1].query():
                    begin, end, nbytes = untimed.popleft()
                    sums[0] += nbytes
                    sums[1] += float(begin.elapsed_time(end)) * 1e-3
            (out_bytes, out_s), (in_bytes, in_s) = self._sums
        return (out_bytes, out_s), (in_bytes, in_s)

    def pin(self, address: int, nbytes: int) -> bool:
        """Register host memory with CUDA; all of it becomes resident."""
        code = pin_host_memory(self.device, address, nbytes)
        if code == 0:
            self.pinned_reason = "registered with CUDA"
            return True
        self.pinned_reason = f"cudaHostRegister failed with error {code}: copies are slower"
        return False

    def unpin(self, address: int) -> None:
        """Undo the registration."""
        unpin_host_memory(address)

    def direct_file(self, descriptor: int) -> DirectFile:
        """Open it with kvikio."""
        return KvikioFile(descriptor)

    def numa_node(self) -> int:
        """Return what sysfs says about the GPU's slot."""
        slot: Any = torch.cuda.get_device_properties(self.device)
        try:
            name = f"{slot.pci_domain_id:04x}:{slot.pci_bus_id:02x}:{slot.pci_device_id:02x}.0"
            return int(Path(f"/sys/bus/pci/devices/{name}/numa_node").read_text())
        except (AttributeError, OSError, ValueError):  # the first: of an older torch
            return -1

    def close(self) -> None:
        """Wait for both side streams."""
        self._out.synchronize()
        self._in.synchronize()


def is_capturing() -> bool:
    """Say whether the current stream captures a CUDA graph."""
    # Nothing is captured where CUDA is not in use, and asking would set it up.
    return _is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture() -> None:
    """Raise RuntimeError while the current stream captures a CUDA graph."""
    if is_capturing():
        raise RuntimeError(
            "activations cannot be offloaded inside a CUDA graph: its replays would not call the "
            "hooks; capture what is outside of `act.forward()`, or train without the graph"
        )


def device_facts() -> tuple[bool, str]:
    """Say whether torch sees a GPU here, and which or why not."""
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        return False, "torch sees no GPU" if built else "this torch was built without CUDA"
    return True, ", ".join(
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    )
