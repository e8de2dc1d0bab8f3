"""Who else moves the same bytes to the same directory: fio, DeepSpeed's aio handle and kvikio."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from benchmarks.fio import cpu_s, fio_program, run_fio
from benchmarks.io_workload import (
    TensorPasses,
    Workload,
    placed_tensor,
    preallocated_file,
    timed,
)
from benchmarks.worker import Answer

__all__ = ["Aio", "Fio", "Kvikio"]

KVIKIO_THREADS = 4


class Fio:
    """The floor: fio's io_uring engine, one job of the same bytes, block size and depth.

    Raises WorkerError where fio is absent or refuses; owns its file until close().
    """

    def __init__(self, workload: Workload, *, fixed_buffers: bool) -> None:
        program = fio_program()
        self._workload = workload
        self._fixed_buffers = fixed_buffers
        shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        self.facts: Answer = {
            "version": shown.stdout.strip(),
            "fixed_buffers": fixed_buffers,
            "huge_pages": True,
        }
        self._path = preallocated_file(workload, "fio")

    def ask(self, request: str) -> Answer:
        """Run one pass, "write" or "read", and return the seconds that fio reports for it."""
        flags = [
            f"--name={request}",
            f"--rw={request}",
            f"--filename={self._path}",
            f"--size={self._workload.total_bytes}",
            f"--bs={self._workload.block_bytes}",
            f"--iodepth={self._workload.queue_depth}",
            f"--fixedbufs={int(self._fixed_buffers)}",
        ]
        job = run_fio(flags, {request: self._workload.total_bytes})
        return {
            "wall_s": max(job[request]["runtime"], 1) / 1e3,
            "cpu_s": cpu_s(job),
        }

    def close(self) -> None:
        """Delete fio's file."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Fio:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Aio(TensorPasses):
    """DeepSpeed's handle at its best: page-locked, aligned tensors, events overlapped."""

    def __init__(self, workload: Workload) -> None:
        from deepspeed.ops.op_builder import AsyncIOBuilder  # noqa: PLC0415 - optional

        builder = AsyncIOBuilder()
        if not builder.is_compatible(verbose=False):
            raise RuntimeError("DeepSpeed's async_io does not build here; is libaio-dev installed?")
        module = builder.load(verbose=False)
        self._handle = module.aio_handle(workload.block_bytes, workload.queue_depth, False, True, 1)
        self._tensor_bytes = workload.tensor_bytes
        self._path = preallocated_file(workload, "aio")
        example = torch.empty(0, dtype=torch.uint8)
        super().__init__(
            [
                self._handle.new_cpu_locked_tensor(workload.tensor_bytes, example)
                for _ in range(workload.num_tensors)
            ]
        )

    def write(self) -> Answer:
        """Submit every tensor, then wait for all of them."""
        return timed(lambda: self._move(self._handle.async_pwrite))

    def read(self) -> Answer:
        """Submit every tensor, then wait for all of them."""
        return timed(lambda: self._move(self._handle.async_pread))

    def close(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)

    def _move(self, submit: Callable[[torch.Tensor, str, int], int]) -> None:
        for index, tensor in enumerate(self.tensors):
            if submit(tensor, str(self._path), index * self._tensor_bytes) != 0:
                raise RuntimeError(f"aio refused tensor {index}")
        if self._handle.wait() != len(self.tensors):
            raise RuntimeError("aio completed fewer operations than were submitted")


class Kvikio(TensorPasses):
    """kvikio's file handle on page-aligned host memory, with its own threads and O_DIRECT."""

    def __init__(self, workload: Workload) -> None:
        import kvikio  # noqa: PLC0415 - optional
        import kvikio.defaults  # noqa: PLC0415

        kvikio.defaults.set("num_threads", KVIKIO_THREADS)
        kvikio.defaults.set("task_size", workload.block_bytes)
        # Without these the page cache would be what is measured.
        kvikio.defaults.set("auto_direct_io_read", True)
        kvikio.defaults.set("auto_direct_io_write", True)
        self._tensor_bytes = workload.tensor_bytes
        self._path = preallocated_file(workload, "kvikio")
        self._file = kvikio.CuFile(str(self._path), "r+")
        super().__init__(
            [placed_tensor(workload.tensor_bytes, 0) for _ in range(workload.num_tensors)]
        )

    def write(self) -> Answer:
        """Submit every tensor, then wait for all of them."""
        return timed(lambda: self._move(self._file.pwrite))

    def read(self) -> Answer:
        """Submit every tensor, then wait for all of them."""
        return timed(lambda: self._move(self._file.pread))

    def close(self) -> None:
        """Close and delete the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _move(self, submit: Callable[..., Any]) -> None:
        futures = [
            submit(tensor.numpy(), file_offset=index * self._tensor_bytes)
            for index, tensor in enumerate(self.tensors)
        ]
        moved = sum(future.get() for future in futures)
        if moved != self._tensor_bytes * len(self.tensors):
            raise RuntimeError(f"kvikio moved {moved} bytes")
