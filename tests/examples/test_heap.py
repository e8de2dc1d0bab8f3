"""Freed memory stays with a process that asks for that, and else does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from examples.heap import keep_freed_memory

MIB = 1 << 20
PROGRAM = """
import resource, sys
import torch
from examples.heap import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    # Sizes on both sides of what glibc maps one by one.
    tensors = [torch.ones(size << 18) for size in (4, 8, 40)]

for _ in range(6):  # until the places have settled
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


def faults_of_ten_steps(mode: str) -> int:
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again_without_a_page_fault() -> None:
    assert faults_of_ten_steps("keep") < 100
    assert faults_of_ten_steps("give back") > 10_000  # 40 MiB are 10,240 pages


def test_a_c_library_without_mallopt_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _name: object())
    assert not keep_freed_memory()
