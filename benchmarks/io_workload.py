"""What the I/O benchmark moves, and how a pass over it is timed and checked."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.worker import Answer

__all__ = ["TensorPasses", "Workload", "placed_tensor", "preallocated_file", "timed"]

PAGE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is moved: `total_bytes` in tensors of `tensor_bytes`, to files under `directory`."""

    directory: str
    total_bytes: int
    tensor_bytes: int
    block_bytes: int
    queue_depth: int
    staging_bytes: int
    io_engine: str

    def __post_init__(self) -> None:
        """Refuse sizes that do not divide: every subject must move the same blocks."""
        for flag, nbytes, unit_flag, unit in (
            ("--block-bytes", self.block_bytes, "the page", PAGE_BYTES),
            ("--tensor-bytes", self.tensor_bytes, "--block-bytes", self.block_bytes),
            ("--bytes", self.total_bytes, "--tensor-bytes", self.tensor_bytes),
        ):
            if nbytes % unit:
                raise ValueError(f"{flag} {nbytes}: not a multiple of {unit_flag} {unit}")

    @property
    def num_tensors(self) -> int:
        """How many tensors are moved in one pass."""
        return self.total_bytes // self.tensor_bytes


def timed(action: Callable[[], None]) -> Answer:
    """Run `action` and return its wall seconds and this process's CPU seconds, all threads."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    action()
    wall_s = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall_s": wall_s, "cpu_s": cpu_s}


def placed_tensor(nbytes: int, residue: int) -> torch.Tensor:
    """Return a byte tensor whose address is `residue` modulo the page."""
    room = torch.empty(nbytes + PAGE_BYTES, dtype=torch.uint8)
    lead = (residue - room.data_ptr()) % PAGE_BYTES
    return room[lead : lead + nbytes]


def preallocated_file(workload: Workload, name: str) -> Path:
    """Create a file with all its space, as the spill has: extending writes would be slower."""
    handle, path = tempfile.mkstemp(prefix=f"{name}-", dir=workload.directory)
    try:
        os.posix_fallocate(handle, 0, workload.total_bytes)
    finally:
        os.close(handle)
    return Path(path)


def fill(tensor: torch.Tensor, seed: int) -> None:
    """Give a byte tensor contents of its own, so that a block in the wrong place is noticed."""
    tensor.view(torch.int64).random_(generator=torch.Generator().manual_seed(seed))


class TensorPasses:
    """The requests a worker answers, over tensors of which each has contents of its own."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors
        for index, tensor in enumerate(tensors):
            fill(tensor, index)

    def answer(self, request: str) -> Answer:
        """Do one pass: "write", "read", or "check", which lists what came back wrong."""
        if request == "write":
            return self.write()
        if request == "read":
            return self.read()
        return {"wrong": self.wrong_tensors()}

    def write(self) -> Answer:
        """Write every tensor; returns what `timed` does and what else the subject counts."""
        raise NotImplementedError

    def read(self) -> Answer:
        """Read every tensor back; returns what `timed` does and what else the subject counts."""
        raise NotImplementedError

    def wrong_tensors(self) -> list[int]:
        """Read into emptied tensors and return the numbers of those that are not as written."""
        for tensor in self.tensors:
            tensor.zero_()
        self.read()
        wrong = []
        for index, tensor in enumerate(self.tensors):
            expected = torch.empty_like(tensor)
            fill(expected, index)
            if not torch.equal(tensor, expected):
                wrong.append(index)
        return wrong
