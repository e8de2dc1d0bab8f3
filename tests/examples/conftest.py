"""Ways to run `train_gpt.py` at a tiny size: in this process, or as a user would."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TINY = [
    *("--layers=2", "--hidden=64", "--heads=2", "--seq-len=64", "--micro-batch=4"),
    *("--steps=3", "--eval-every=2", "--min-tensor-bytes=4096", "--staging-bytes=4MiB"),
]


@pytest.fixture(scope="session")
def train_gpt() -> Iterator[ModuleType]:
    """The script as a module, with its neighbours importable as they are for the script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("train_gpt")


@pytest.fixture
def main(train_gpt: ModuleType) -> Iterator[Callable[..., int]]:
    """The script's `main`, tiny where the flags say nothing else; an exit is its status."""

    def run(*arguments: str | Path) -> int:
        try:
            return int(train_gpt.main([*TINY, *map(str, arguments)]))
        except SystemExit as end:
            return int(end.code or 0)

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other on so little work
    yield run
    torch.set_num_threads(num_threads)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script as a process, or as `num_ranks` of them by torchrun."""
    children: list[subprocess.Popen[str]] = []

    def run(*arguments: str | Path, num_ranks: int = 0) -> subprocess.Popen[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        command = [*(torchrun if num_ranks else []), str(EXAMPLES / "train_gpt.py"), *TINY]
        children.append(
            subprocess.Popen(
                [sys.executable, *command, *map(str, arguments)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return children[-1]

    yield run
    for child in children:
        child.terminate()  # torchrun takes its ranks along
        child.communicate()
