"""Builds the C++ test programs beside this file and runs each as one test."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROGRAMS = sorted(path.stem for path in HERE.glob("test_*.cpp"))


@pytest.fixture(scope="module")
def built_programs() -> Path:
    """The folder of the compiled programs; one that does not compile fails every test here."""
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    command = ["make", "-f", "tests/csrc/Makefile", jobs, "plain"]
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "csrc.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return ROOT / "build" / "csrc" / "plain"


def test_there_are_cpp_programs_to_run() -> None:
    assert PROGRAMS


# The first test also waits for the compiler.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("program", PROGRAMS)
def test_cpp(program: str, built_programs: Path) -> None:
    ran = subprocess.run([built_programs / program], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, f"{program} exited with {ran.returncode}\n{ran.stdout}{ran.stderr}"


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    "source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda it: it.name
)
def test_cuda_compiles_without_a_warning(source: Path, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++20", "-arch=sm_80", "-fmad=false", "-Werror=all-warnings", "-c"]
    command += ["-Xptxas", "-O0"]  # which is most of the time, and warns of nothing
    ran = subprocess.run(
        [*command, source, "-o", tmp_path / "object.o"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
