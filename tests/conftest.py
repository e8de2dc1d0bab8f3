"""Fixtures that every test may use: the I/O engines, and a spill directory on a real disk."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Threads of OpenMP that spin until there is work take the processor from the tests beside them,
# which makes programs with two threads several times slower. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

from offload import native

ROOT = Path(__file__).resolve().parent.parent

# A slow example is no failure: how long things take is measured in benchmarks/.
settings.register_profile("offload", deadline=None, print_blob=True)
settings.load_profile("offload")

# A shell has what it starts in the background ignore Ctrl-C, and so would the programs under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["uring", "posix"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each I/O engine's name in turn; one this kernel refuses is skipped with its reason."""
    available, reason = native.probe_engines()[request.param]
    if not available:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def spill_dir(tmp_path: Path) -> Iterator[Path]:
    """An empty directory on a disk: pytest's own, or one under build/ where that one is in RAM."""
    if native.inspect_directory(str(tmp_path)).backing == "disk":
        yield tmp_path
        return
    parent = ROOT / "build" / "test-spill"
    parent.mkdir(parents=True, exist_ok=True)
    backing = native.inspect_directory(str(parent)).backing
    if backing != "disk":
        pytest.skip(f"neither {tmp_path} nor {parent} is on a disk ({backing})")
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        yield Path(directory)
