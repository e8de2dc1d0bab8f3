"""CUDA devices: copies on two side streams, ordered with the computation by events only."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from offload.device.link import DeviceLink, Moment
from offload.native import Buffer, tensor_over

__all__ = ["CudaLink", "device_facts"]

# Untyped in torch.
_Stream: Any = torch.cuda.Stream
_Event: Any = torch.cuda.Event
_cudart: Any = torch.cuda.cudart
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process


class CudaLink(DeviceLink):
    """One GPU. Nothing here waits for the whole device.

    Memory that crosses belongs to the stream that computes with it, so that the caching allocator
    reuses it in that stream's order: nothing need be recorded for another stream, which would hold
    memory for as long as the host runs ahead.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._out = _Stream(device)
        self._in = _Stream(device)
        # Copies whose time is not known yet: begin, end, bytes. One list for each direction.
        self._untimed: tuple[deque[tuple[Any, Any, int]], ...] = (deque(), deque())
        self._sums = [[0.0, 0.0], [0.0, 0.0]]
        self._timing = threading.Lock()

    def copy_out(self, source: torch.Tensor, target: Buffer) -> Moment:
        """Copy on the side stream for leaving.

        Raises RuntimeError while a CUDA graph is captured, which would keep this one copy for ever.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "activations cannot be offloaded inside a CUDA graph: its replays would not call "
                "the hooks; capture what is outside of `act.forward()`, or train without the graph"
            )
        self._out.wait_event(self.mark(timed=False))
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
        # Whoever waits for it sleeps, instead of keeping a core busy.
        end: Any = _Event(enable_timing=True, blocking=True)
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        with self._timing:
            self._untimed[direction].append((begin, end, source.nbytes))
        moment: Moment = end
        return moment

    def mark(self, timed: bool = True) -> Any:
        """Return an event on the current stream."""
        event = _Event(enable_timing=timed)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def hold(self, moment: Moment) -> None:
        """Have the current stream wait for an event."""
        stream: Any = torch.cuda.current_stream(self.device)
        stream.wait_event(moment)

    def queue_id(self) -> int:
        """Return the handle of the current stream."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def elapsed_s(self, begin: Any, end: Any) -> float:
        """Return the seconds between two events."""
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
        code = _cudart().cudaHostRegister(address, nbytes, _PORTABLE)
        done = int(code) == 0
        said = f"cudaHostRegister failed with error {int(code)}: copies are slower"
        self.pinned_reason = "registered with CUDA" if done else said
        return done

    def unpin(self, address: int) -> None:
        """Undo the registration."""
        _cudart().cudaHostUnregister(address)

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


def device_facts() -> tuple[bool, str]:
    """Say whether torch sees a GPU here, and which or why not."""
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        return False, "torch sees no GPU" if built else "this torch was built without CUDA"
    return True, ", ".join(
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    )
