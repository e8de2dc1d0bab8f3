"""How a rank ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import atexit, sys
import torch.distributed as dist
from ranks import joined_ranks, leave

atexit.register(print, "the interpreter ended")
with joined_ranks() as num_ranks:
    sys.stdout.write(f"{num_ranks} ranks, joined: {dist.is_initialized()}\\n")
sys.stdout.write("left\\n")
leave(STATUS)
"""


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("torchrun", [True, False])
def test_a_rank_leaves_with_its_status_and_its_words_before_the_interpreter_ends(
    tmp_path: Path, torchrun: bool, status: int
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("STATUS", str(status)), "utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    child = subprocess.run(
        [sys.executable, *(launcher if torchrun else []), str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "examples"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (child.returncode == 0) == (status == 0)
    assert f"{int(torchrun)} ranks, joined: {torchrun}\nleft\n" in child.stdout
    assert ("the interpreter ended" in child.stdout) != torchrun
    if status:
        assert child.returncode == status or f"exitcode: {status}" in child.stderr
