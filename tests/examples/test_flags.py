"""What is wrong gets one line that names it, the right status, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import offload
from offload import native

Main = Callable[..., int]

BAD_FLAGS = [
    (["--offload=host"], ["--offload='host'", "needs a GPU"]),
    (["--offload=sdd"], ["--offload", "sdd", "did you mean ssd?"]),
    (["--ofload=ssd"], ["--ofload", "did you mean --offload?"]),
    (["--qqqq"], ["--qqqq", "--help"]),
    (["extra"], ["extra"]),
    (["--staging-bytes=-1"], ["--staging-bytes", "-1", "64MiB"]),
    (["--staging-bytes", "-1"], ["--staging-bytes", "-1"]),
    (["--staging-bytes=1"], ["--staging-bytes=1", "at least 4096"]),
    (["--staging-bytes=99999999GiB"], ["--staging-bytes=", "more memory than there is"]),
    (["--min-tensor-bytes=-4096"], ["--min-tensor-bytes", "-4096"]),
    (["--spill-bytes=-5"], ["--spill-bytes", "-5"]),
    (["--spill-bytes=1.5GiB"], ["--spill-bytes", "1.5GiB"]),
    (["--spill-bytes=0"], ["--spill-bytes=0"]),
    (["--io-engine=aio"], ["--io-engine", "aio", "uring"]),
    (["--layers=0"], ["--layers", "'0'", "from 1 up"]),
    (["--steps=x"], ["--steps", "'x'", "whole number"]),
    (["--seed=-1"], ["--seed", "'-1'"]),
    (["--lr=nan"], ["--lr", "nan"]),
    (["--lr=inf"], ["--lr", "inf"]),
    (["--heads=3"], ["--heads 3", "--hidden 64"]),
    (["--dtype=fp16"], ["--dtype", "fp16", "bf16"]),
    (["--model=brt"], ["--model", "brt", "bert"]),
    (["--model=llama", "--hidden=6"], ["--heads 2", "llama", "even"]),
    (["--model=t5", "--seq-len=1"], ["--seq-len 1", "t5"]),
    (["--dropout=1.5"], ["--dropout", "1.5"]),
    (["--host-bytes=99999999GiB"], ["--host-bytes=", "more memory than there is"]),
    (["--loader=dari"], ["--loader", "dari", "did you mean dali?"]),
    (["--memory-bytes=-1"], ["--memory-bytes", "-1"]),
    (["--framework=deepspeed"], ["--framework", "deepspeed", "not available yet"]),
    (["--offload=none", "--memory-bytes=8MiB"], ["--memory-bytes", "--offload none", "auto"]),
    (["--optimizer=ofload"], ["--optimizer", "ofload", "did you mean offload"]),
    (["--optimizer-placement", "host=0.5"], ["--optimizer-placement", "0.5", "not to 1"]),
    (["--tokens=sparse", "--model=bert"], ["--tokens sparse", "gpt and llama", "bert"]),
    (["--tokens=gradient", "--offload=auto"], ["--tokens gradient", "--offload auto"]),
    (["--tokens=exact", "--keep=0.5"], ["--keep", "--tokens exact"]),
    (["--tokens=sparse", "--keep=2"], ["--keep 2", "at most 1"]),
    (["--tokens=exact", "--meter-steps=5"], ["--meter-steps is nothing to --tokens exact"]),
    (["--tokens=gradient", "--seq-len=128"], ["--seq-len 128", "take more than 128"]),
    (["--tokens=exact", "--framework=megatron"], ["--tokens is nothing to --framework megatron"]),
    (["--seq-len=10000000"], ["stdlib", "too few"]),
    (["--data=missing.txt"], ["--data", "missing.txt", "No such file"]),
    (["--data=missing.bin"], ["--data", "missing.bin", "No such file"]),
    (["--summary=missing/summary.json"], ["--summary", "missing/summary.json"]),
    (["--offload-path=missing"], ["--offload-path", "missing", "No such file", "mkdir -p"]),
    (["--offload-path=file"], ["--offload-path", "file", "Not a directory"]),
    (["--offload-path", ".", "missing"], ["--offload-path", "missing", "No such file"]),
]


def the_only_line(text: str) -> str:
    """Return the one line of `text`, which must be the script's complaint."""
    (line,) = text.splitlines()
    assert line.startswith("train_gpt.py: error: ")
    return line


@pytest.mark.parametrize(("flags", "named"), BAD_FLAGS, ids=lambda value: " ".join(value)[:40])
def test_what_is_wrong_gets_one_line_and_status_2(
    flags: list[str],
    named: list[str],
    main: Main,
    spill_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (spill_dir / "file").touch()
    monkeypatch.chdir(spill_dir)
    assert main("--offload=ssd", "--offload-path=.", *flags) == 2
    out, err = capfd.readouterr()
    line = the_only_line(err)
    assert [part for part in named if part not in line] == []
    assert not out
    assert [path.name for path in spill_dir.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_path_is_refused(
    main: Main, spill_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spill_dir.chmod(0o500)
    assert main("--offload=ssd", f"--offload-path={spill_dir}") == 2
    assert f"--offload-path {spill_dir}: not writable" in the_only_line(capfd.readouterr().err)


@pytest.mark.parametrize("directory", ["/proc", "/sys"])
def test_a_directory_that_takes_no_files_is_refused(
    directory: str, main: Main, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main("--offload=ssd", f"--offload-path={directory}") == 2
    assert f"--offload-path {directory}" in the_only_line(capfd.readouterr().err)


def test_a_directory_in_ram_is_refused(main: Main, capfd: pytest.CaptureFixture[str]) -> None:
    if not os.path.isdir("/dev/shm") or native.inspect_directory("/dev/shm").backing != "memory":
        pytest.skip("/dev/shm is not in RAM here")
    assert main("--offload=ssd", "--offload-path=/dev/shm") == 2
    line = the_only_line(capfd.readouterr().err)
    assert "--offload-path /dev/shm is in RAM" in line


def test_a_full_disk_is_refused_at_the_start(
    main: Main,
    spill_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(**_settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(spill_dir))

    monkeypatch.setattr(offload, "ActivationOffload", full)
    assert main("--offload=ssd", f"--offload-path={spill_dir}") == 2
    line = the_only_line(capfd.readouterr().err)
    assert f"--offload-path {spill_dir}: No space left on device" in line


def test_a_warning_is_one_line_above_the_progress_bar(
    main: Main, spill_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # So little that the very first tensor finds none; without pytest's own filter.
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main("--offload=ssd", f"--offload-path={spill_dir}", "--spill-bytes=4096") == 0
    err = capfd.readouterr().err
    (line,) = [line for line in err.replace("\r", "\n").splitlines() if "warning" in line]
    assert line.startswith("train_gpt.py: warning: ")
    assert "find no space stay in memory" in line


@pytest.mark.parametrize("operation", ["write", "read"])
def test_an_io_error_while_training_gets_one_line_and_status_1(
    operation: str,
    main: Main,
    spill_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fail = native.FaultRule(op=operation, first=5, count=1, action="error", errno=errno.EIO)
    real = offload.ActivationOffload

    def failing(**settings: Any) -> offload.ActivationOffload:
        plan = native.FaultPlan(rules=(fail,))
        return real(**{**settings, "io_engine": plan})

    monkeypatch.setattr(offload, "ActivationOffload", failing)
    assert main("--offload=ssd", f"--offload-path={spill_dir}") == 1
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if "train_gpt.py: error: " in line]
    assert len(lines) == 1
    assert "Input/output error" in lines[0]
    assert str(spill_dir) in lines[0]
    assert "Traceback" not in err
    assert not any(spill_dir.iterdir())
