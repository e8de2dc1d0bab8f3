"""The process in which one subject of the I/O benchmark does its passes, ours among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.io_peers import Aio, Kvikio
from benchmarks.io_workload import TensorPasses, Workload, placed_tensor, timed
from benchmarks.worker import Answer, Subject, Worker, serve
from offload import native

__all__ = ["Ours", "open_worker"]

TORCH_ALIGNMENT = 64  # what torch gives; O_DIRECT needs 512 or more, so every byte is staged
# DeepSpeed compiles its handle on first use; kvikio can hang where it finds no driver.
START_TIMEOUT_S = {"ours": 120.0, "aio": 1200.0, "kvikio": 60.0}


class Ours(TensorPasses):
    """The spill, given tensors where torch puts them."""

    def __init__(self, workload: Workload) -> None:
        self._total_bytes = workload.total_bytes
        nbytes = workload.tensor_bytes
        super().__init__(
            [placed_tensor(nbytes, TORCH_ALIGNMENT) for _ in range(workload.num_tensors)]
        )
        self._spill = native.Spill(
            workload.directory,
            native.Arena(workload.staging_bytes),
            engine=workload.io_engine,
            queue_depth=workload.queue_depth,
            block_bytes=workload.block_bytes,
            # The pages around a tensor come with it, so that its address is kept modulo 64.
            spill_bytes=workload.num_tensors * (nbytes + 2 * workload.block_bytes),
            verify=True,
        )
        self._extents: list[native.Extent] = []

    def facts(self) -> Answer:
        """Return the path that was taken."""
        return {
            "io_engine": self._spill.engine,
            "io_engine_reason": self._spill.engine_reason,
            "direct": self._spill.direct,
            "direct_reason": self._spill.direct_reason,
            "registered_buffers": self._spill.registered,
            "crc32c": native.crc32c_path(),
        }

    def write(self) -> Answer:
        """Stage and write every tensor; adds the CPU seconds of copying and checksumming."""
        self._extents.clear()  # their space is what this pass overwrites
        before = self._spill.stats()
        answer = timed(self._write_all)
        after = self._spill.stats()
        self._require_moved("written", after["write_bytes"] - before["write_bytes"])
        return {**answer, "copy_s": after["copy_s"] - before["copy_s"]}

    def read(self) -> Answer:
        """Read every tensor back, checked; adds the CPU seconds of checking."""
        before = self._spill.stats()
        answer = timed(lambda: self._fetch_all(lambda _index, _buffer: None))
        after = self._spill.stats()
        self._require_moved("read", after["read_bytes"] - before["read_bytes"])
        return {**answer, "verify_s": after["verify_s"] - before["verify_s"]}

    def wrong_tensors(self) -> list[int]:
        """Fetch every tensor and return the numbers of those that are not as written."""
        wrong: list[int] = []

        def compare(index: int, buffer: native.Buffer) -> None:
            if not torch.equal(native.tensor_over(buffer, torch.uint8), self.tensors[index]):
                wrong.append(index)

        self._fetch_all(compare)
        return wrong

    def close(self) -> None:
        """Give back the spill's space."""
        self._extents.clear()
        self._spill.close()

    def _write_all(self) -> None:
        for tensor in self.tensors:
            extent = self._spill.write(tensor.data_ptr(), tensor.nbytes)
            if extent is None:
                raise RuntimeError("the spill has no space for a pass that fits")
            self._extents.append(extent)
        self._spill.drain()

    def _fetch_all(self, use: Callable[[int, native.Buffer], None]) -> None:
        ahead = 0
        for index, extent in enumerate(self._extents):
            ahead = max(ahead, index)
            while ahead < len(self._extents) and self._extents[ahead].prefetch():
                ahead += 1
            use(index, extent.fetch())

    def _require_moved(self, what: str, nbytes: float) -> None:
        # A tensor handed back from staging was not read: such a pass would flatter the figure.
        if nbytes < self._total_bytes:
            raise RuntimeError(f"{nbytes:.0f} bytes {what} of {self._total_bytes}")


def open_worker(name: str, workload: Workload) -> Worker:
    """Start the worker of subject `name`; raises WorkerError with the reason for its absence."""
    settings = {"subject": name, **asdict(workload)}
    return Worker(name, __name__, settings, start_timeout_s=START_TIMEOUT_S[name])


def _open_subject(settings: Mapping[str, object]) -> tuple[Subject, Answer]:
    rest: dict[str, Any] = dict(settings)
    name = rest.pop("subject")
    workload = Workload(**rest)
    if name == "ours":
        ours = Ours(workload)
        return ours, ours.facts()
    return (Aio(workload) if name == "aio" else Kvikio(workload)), {}


if __name__ == "__main__":
    serve(_open_subject)
