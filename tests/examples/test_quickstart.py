"""The README's example runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.py"


def test_quickstart_trains_and_offloads(spill_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, QUICKSTART, spill_dir],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    losses = [
        float(line.rpartition(" ")[2])
        for line in done.stdout.splitlines()
        if line.startswith("step")
    ]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    offloaded = int(done.stdout.splitlines()[-1].split()[0])
    # The first step offloads six layers with two 8 MiB tensors each; then the schedule decides.
    assert offloaded > 6 * 2 * 8
    assert not any(spill_dir.iterdir())


def test_quickstart_fits_the_readme() -> None:
    assert len(QUICKSTART.read_text(encoding="utf-8").splitlines()) <= 30
