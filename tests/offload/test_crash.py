"""However a training process ends, the space that it used on the SSD is free again."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPILL_BYTES = 64 << 20
DEADLINE_S = 10  # what the project promises

TRAIN = """
import os, signal, sys
import torch
import offload

directory, ending, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)


class Endless(torch.utils.data.Dataset):
    def __len__(self):
        return 1 << 30

    def __getitem__(self, index):
        return torch.full((512, 512), float(index % 7))


act = offload.ActivationOffload(
    path=directory, min_tensor_bytes=0, staging_bytes=4 << 20, spill_bytes=64 << 20
)
weight = torch.ones(512, 512, requires_grad=True)


def step(x):
    with act.forward():
        y = x
        for _ in range(8):
            y = (y * weight).sin()
        loss = y.sum()
        del y
    loss.backward()


if workers:  # forked while files and rings are open
    batches = iter(torch.utils.data.DataLoader(
        Endless(), batch_size=None, num_workers=workers, multiprocessing_context="fork"
    ))
else:
    batches = iter(lambda: torch.ones(512, 512), None)
step(next(batches))
print("training", flush=True)
for count, batch in enumerate(batches):
    step(batch)
    if count == 3 and ending == "exception":
        raise KeyError("on purpose")
    if count == 3 and ending == "exit":
        with act.forward():
            kept = (batch * weight).sin()  # a graph still open, an instance not closed
        sys.exit(0)
    if count == 3 and ending == "exit in a forked child":
        if os.fork() == 0:
            sys.exit(0)
        os.wait()
        step(batch)
        sys.exit(0)
"""


def group_members(group: int) -> list[int]:
    """Processes of a group that still run; what is dead and not waited for holds no file."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] not in "ZX":
                    members.append(int(entry))
    return members


def open_spill_bytes(directory: Path) -> int:
    """Bytes allocated to files under `directory` that any process still holds open."""
    held: dict[tuple[int, int], int] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{entry}/fd"):
                link = f"/proc/{entry}/fd/{number}"
                with contextlib.suppress(OSError):
                    if os.readlink(link).startswith(str(directory)):
                        stat = os.stat(link)
                        held[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(held.values())


def free_bytes(directory: Path) -> int:
    facts = os.statvfs(directory)
    return facts.f_bfree * facts.f_frsize


def train(directory: Path, ending: str, workers: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(directory), ending, str(workers)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its own group, so that all of it can be killed
    )


def wait_until_training(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 90)
    line = process.stdout.readline() if ready else ""
    if line != "training\n":
        process.kill()
        assert process.stderr is not None
        pytest.fail(f"no training: {process.stderr.read()}")


def wait_until_gone(directory: Path, group: int) -> None:
    """Wait for the group's last process; from then on the promised time runs."""
    patience = time.monotonic() + 30
    while group_members(group):
        assert time.monotonic() < patience, f"still running: {group_members(group)}"
        time.sleep(0.02)
    deadline = time.monotonic() + DEADLINE_S
    while open_spill_bytes(directory):
        assert time.monotonic() < deadline, f"{open_spill_bytes(directory)} bytes are still used"
        time.sleep(0.02)
    assert list(directory.iterdir()) == []


def space_is_back(directory: Path, before: int, left: int) -> bool:
    """Say whether free space is `before` again but for `left` bytes, which others may write."""
    deadline = time.monotonic() + DEADLINE_S
    while free_bytes(directory) < before - left:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def end(process: subprocess.Popen[str], ending: int | None) -> str:
    if ending is not None:
        os.killpg(process.pid, ending)
    try:
        return process.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("workers", "times"),
    [(0, 20), (2, 8), pytest.param(2, 20, marks=pytest.mark.soak)],
    ids=["alone", "with forked workers", "with forked workers, long"],
)
def test_killed_in_mid_step_many_times_leaves_all_space_free(
    spill_dir: Path, workers: int, times: int
) -> None:
    before = free_bytes(spill_dir)
    at_once = 4  # most of a start is importing
    for _ in range(times // at_once):
        trainings = [train(spill_dir, "never", workers) for _ in range(at_once)]
        for training in trainings:
            wait_until_training(training)
        assert open_spill_bytes(spill_dir) >= at_once * SPILL_BYTES
        for number, training in enumerate(trainings):
            time.sleep(0.013 * number)  # another moment of the step for each
            end(training, signal.SIGKILL)
            assert training.returncode == -signal.SIGKILL
        for training in trainings:
            wait_until_gone(spill_dir, training.pid)
    # So many spills were written; less than half of that may be other people's doing.
    assert space_is_back(spill_dir, before, times * SPILL_BYTES // 2)


@pytest.mark.timeout(200)
def test_killing_only_the_parent_leaves_nothing_once_its_workers_are_gone(spill_dir: Path) -> None:
    training = train(spill_dir, "never", workers=2)
    wait_until_training(training)
    workers = [pid for pid in group_members(training.pid) if pid != training.pid]
    assert len(workers) == 2
    os.kill(training.pid, signal.SIGKILL)
    training.wait()
    deadline = time.monotonic() + DEADLINE_S
    # Forked children closed the file when they were made: it is free though they may still run.
    while open_spill_bytes(spill_dir):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    end(training, signal.SIGKILL if group_members(training.pid) else None)
    wait_until_gone(spill_dir, training.pid)


@pytest.mark.parametrize(
    ("ending", "sent", "code", "words"),
    [
        ("never", signal.SIGTERM, -signal.SIGTERM, ""),
        ("never", signal.SIGINT, None, "KeyboardInterrupt"),
        ("exception", None, 1, "KeyError: 'on purpose'"),
        ("exit", None, 0, ""),
        ("exit in a forked child", None, 0, ""),
    ],
)
def test_every_other_ending_leaves_nothing_either(
    spill_dir: Path, ending: str, sent: Any, code: int | None, words: str
) -> None:
    training = train(spill_dir, ending)
    wait_until_training(training)
    errors = end(training, sent)
    assert code is None or training.returncode == code, errors
    assert words in errors
    assert words or not errors
    wait_until_gone(spill_dir, training.pid)
