"""kvikio as the direct way uses it, by a module that takes notes, and how doctor finds out."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from offload.device import direct


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was asked of kvikio, in order; an entry `fail` makes the next call fail."""
    noted: list[Any] = []

    class File:
        def __init__(self, path: str, flags: str) -> None:
            noted.append(("open", path, flags, module.mode))  # type: ignore[attr-defined]
            self.descriptors = [os.open(path, os.O_RDWR) for _ in range(2)]  # as kvikio does

        def raw_write(self, tensor: torch.Tensor, size: int, offset: int) -> int:
            return self._moved("write", tensor, size, offset)

        def raw_read(self, tensor: torch.Tensor, size: int, offset: int) -> int:
            return self._moved("read", tensor, size, offset)

        def _moved(self, what: str, tensor: torch.Tensor, size: int, offset: int) -> int:
            if "fail" in noted:
                raise RuntimeError("cuFile says no")
            noted.append((what, tensor.data_ptr(), size, offset))
            return size

        def close(self) -> None:
            for descriptor in self.descriptors:
                os.close(descriptor)
            noted.append("close")

    class Setting:
        def __init__(self, key: str, value: str) -> None:
            self.before, module.mode = module.mode, value  # type: ignore[attr-defined]
            assert key == "compat_mode"

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            module.mode = self.before  # type: ignore[attr-defined]

    module = ModuleType("kvikio")
    module.mode = "AUTO"  # type: ignore[attr-defined]
    module.CuFile = File  # type: ignore[attr-defined]
    module.CompatMode = SimpleNamespace(OFF="OFF")  # type: ignore[attr-defined]
    module.defaults = SimpleNamespace(set=Setting)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvikio", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    yield noted
    assert module.mode == "AUTO"  # type: ignore[attr-defined]


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
    yield opened
    os.close(opened)


def test_the_file_is_opened_by_its_descriptor_and_never_by_way_of_host_memory(
    notes: list[Any], descriptor: int
) -> None:
    tensor = torch.zeros(100, dtype=torch.uint8)
    file = direct.KvikioFile(descriptor)
    assert len(file._opened) == 2
    assert descriptor not in file._opened
    assert (file.write(tensor, 4096), file.read(tensor[10:], 8192)) == (100, 90)
    file.close()
    begin = tensor.data_ptr()
    assert notes == [
        ("open", f"/proc/self/fd/{descriptor}", "r+", "OFF"),
        ("write", begin, 100, 4096),
        ("read", begin + 10, 90, 8192),
        "close",
    ]


def test_what_cufile_says_becomes_an_oserror_with_place_and_size(
    notes: list[Any], descriptor: int, tmp_path: Path
) -> None:
    file = direct.KvikioFile(descriptor)
    notes.append("fail")
    tensor = torch.zeros(100, dtype=torch.uint8)
    with pytest.raises(OSError, match="write of 100 bytes at 4096 by cuFile: cuFile says") as told:
        file.write(tensor, 4096)
    assert told.value.errno == errno.EIO
    assert str(told.value.filename).startswith(str(tmp_path))
    with pytest.raises(OSError, match="read of 100 bytes at 0 by"):
        file.read(tensor, 0)
    file.close()


# As the driver writes it, with its statistics on and off.
COUNTED = """GDS Version: 1.7.1.2
NVFS statistics(ver: 4.0)
NVFS Driver(version: 2.17.3)
Mellanox PeerDirect Supported: False
IO stats: Enabled, peer IO stats: Disabled
Active Shadow-Buffer (MiB): 0
Active Process: 0
Reads\t\t\t\t: err=0 io_state_err=0
Reads\t\t\t\t: n={} ok=6 err=0 readMiB=0 io_state_err=0
Reads\t\t\t\t: Bandwidth(MiB/s)=0 Avg-Latency(usec)=0
Sparse Reads\t\t\t\t: n=77 io=0 holes=0 pages=0
Writes\t\t\t\t: err=0 io_state_err=0 pg-cache=0 pg-cache-fail=0 pg-cache-eio=0
Writes\t\t\t\t: n=1 ok=1 err=0 writeMiB=0 io_state_err=0
Mmap\t\t\t\t: n=4 ok=4 err=0 munmap=4
"""
UNCOUNTED = """GDS Version: 1.7.1.2
IO stats: Disabled, peer IO stats: Disabled
Reads\t\t\t\t: err=0 io_state_err=0
Writes\t\t\t\t: err=0 io_state_err=0
"""


def counted(operations: int) -> str:
    return COUNTED.format(operations)


def test_a_driver_that_does_not_count_proves_nothing_and_how_it_would_is_said(
    notes: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stats = tmp_path / "stats"
    stats.write_text(UNCOUNTED)
    monkeypatch.setattr(direct, "_STATS", stats)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    works, why = direct.direct_facts(str(tmp_path))
    assert not works
    assert "rw_stats_enabled" in why


def test_what_is_not_proved_is_refused_when_it_is_asked_for(
    notes: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(direct, "direct_facts", lambda path: (path != str(tmp_path), "not here"))
    direct.require_direct(["/elsewhere"])
    with pytest.raises(OSError, match="gds=True: not here") as told:
        direct.require_direct(["/elsewhere", str(tmp_path)])
    assert told.value.filename == str(tmp_path)


@pytest.mark.parametrize(
    ("code", "after", "works", "why"),
    [
        (0, 9, True, "counted their transfer"),
        (0, 5, False, "counted no transfer"),
        (0, 6, False, "counted no transfer"),
        (1, 9, False, "failed: no such luck"),
        (None, 9, False, "did not end in"),
    ],
)
def test_only_a_transfer_that_the_driver_counted_is_proof(
    notes: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    code: int | None,
    after: int,
    works: bool,
    why: str,
) -> None:
    stats = tmp_path / "stats"
    stats.write_text(counted(5))

    def run(command: list[str], **_: object) -> object:
        assert command[-3:] == ["offload.device.direct_probe", str(tmp_path), "3"]
        stats.write_text(counted(after))
        if code is None:
            raise subprocess.TimeoutExpired(command, 1)
        return SimpleNamespace(returncode=code, stderr="a traceback\nno such luck\n")

    monkeypatch.setattr(direct, "_STATS", stats)
    monkeypatch.setattr(direct, "_IDLE_S", 0.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("subprocess.run", run)
    found, reason = direct.direct_facts(str(tmp_path))
    assert found is works
    assert why in reason


def test_without_kvikio_a_gpu_or_the_driver_the_answer_is_no_and_why(
    notes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_STATS", Path("/nowhere"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert direct.direct_facts("/tmp") == (
        False,
        "/nowhere cannot be read: the nvidia-fs driver is not loaded",
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch sees no GPU" in direct.direct_facts("/tmp")[1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "kvikio is not installed" in direct.direct_facts("/tmp")[1]


def test_a_driver_that_still_counts_after_the_transfer_proves_nothing(
    notes: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counts = iter([5, 5, 9, 12])  # before, idle, after, and once more: somebody else is at it
    stats = tmp_path / "stats"
    stats.write_text(counted(5))
    monkeypatch.setattr(direct, "_STATS", stats)
    monkeypatch.setattr(direct, "_operations", lambda: next(counts))
    monkeypatch.setattr(direct, "_IDLE_S", 0.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    done = SimpleNamespace(returncode=0, stderr="")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: done)
    works, why = direct.direct_facts(str(tmp_path))
    assert not works
    assert "others keep transferring" in why


def test_ranks_try_one_after_the_other(
    notes: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stats = tmp_path / "stats"
    stats.write_text(counted(5))
    monkeypatch.setattr(direct, "_STATS", stats)
    monkeypatch.setattr(direct, "_IDLE_S", 0.0)
    monkeypatch.setattr(direct, "_LOCK_TRIES", 3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with stats.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        works, why = direct.direct_facts(str(tmp_path))
    assert not works
    assert "other ranks" in why
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    tried = []

    def run(*_: object, **__: object) -> object:
        with stats.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        tried.append(1)
        return SimpleNamespace(returncode=1, stderr="")

    monkeypatch.setattr("subprocess.run", run)
    for _ in range(2):  # whatever came of it, the next one has its turn
        assert "failed" in direct.direct_facts(str(tmp_path))[1]
    assert tried == [1, 1]


def test_while_others_transfer_nothing_is_proved(
    notes: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stats = tmp_path / "stats"
    stats.write_text(counted(5))
    monkeypatch.setattr(direct, "_STATS", stats)
    counts = iter(range(1000))
    monkeypatch.setattr(direct, "_operations", lambda: next(counts))
    monkeypatch.setattr(direct, "_IDLE_S", 0.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    works, why = direct.direct_facts(str(tmp_path))
    assert not works
    assert "others keep transferring" in why
