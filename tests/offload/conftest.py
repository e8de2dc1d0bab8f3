"""Fixtures of these tests: a piece of a test in a forked child, CUDA kernels without a GPU."""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.device.token_kernels import TokenKernels

ROOT = Path(__file__).resolve().parents[2]

# A child that hangs is ended, and the test with it.
PATIENCE_S = 60


def run_in_child(function: Callable[[], Any]) -> Any:
    """Call `function` in a forked child and return its (picklable) result or raise its failure."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE_S)
        try:
            answer = (True, function())
        except BaseException:
            answer = (False, traceback.format_exc())
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise AssertionError(f"the child ended with {os.waitstatus_to_exitcode(status)}")
    worked, answer = pickle.loads(data)
    if not worked:
        raise AssertionError(f"in the child: {answer}")
    return answer


@pytest.fixture
def in_child() -> Callable[[Callable[[], Any]], Any]:
    """`in_child(function)` calls it in a forked child and returns what it returned there."""
    return run_in_child


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Have torch end its vectors where the array ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulated_kernels() -> TokenKernels:
    """The CUDA kernels of tokens, compiled for the host: for tensors there."""
    library = ROOT / "build" / "csrc" / "emulated_kernels.so"
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "csrc.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        command = ["make", "-f", "tests/csrc/Makefile", str(library.relative_to(ROOT))]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return TokenKernels(library)
