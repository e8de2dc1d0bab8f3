"""The guides of frameworks: each example runs as it stands, and so does each command."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from offload import native
from offload.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


BEFORE = {
    # Which it would compile for a minute, to add up among ranks of one machine.
    "deepspeed": (
        "import deepspeed.ops\ndeepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False\n"
    ),
    "megatron.core": ("from tests.offload.integrations.megatron_shim import install\ninstall()\n"),
}
"""What an example of a framework needs besides, without a GPU."""


def example_of(guide: str) -> str:
    """Return the guide's programs, one behind the other."""
    found = re.findall(r"^```python\n(.*?)^```", (DOCS / guide).read_text(), flags=re.M | re.S)
    assert found
    return "\n".join(found)


@pytest.mark.parametrize(
    ("guide", "needs", "command"),
    [
        ("deepspeed.md", "deepspeed", ["-m", "torch.distributed.run", "--nproc_per_node=2"]),
        ("transformers.md", "transformers", []),
        ("megatron.md", "megatron.core", ["-m", "torch.distributed.run", "--nproc_per_node=2"]),
        ("tokens.md", "transformers", []),
    ],
)
def test_the_example_of_the_guide_runs(
    guide: str, needs: str, command: list[str], spill_dir: Path
) -> None:
    pytest.importorskip(needs)
    (spill_dir / "spill").mkdir()
    file = spill_dir / "example.py"
    file.write_text(BEFORE.get(needs, "") + example_of(guide))
    standalone = ["--standalone"] if command else []
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, *command, *standalone, str(file)],
        cwd=spill_dir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bytes were offloaded" in done.stdout
    assert not list((spill_dir / "spill").iterdir())
    assert native.inspect_directory(str(spill_dir)).backing == "disk"


def test_the_command_of_the_guide_rewrites_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [line] = re.findall(
        r"^```sh\n(.*?)^```", (DOCS / "deepspeed.md").read_text(), flags=re.M | re.S
    )
    program, *words = shlex.split(line)
    assert program == "offload"
    monkeypatch.chdir(tmp_path)
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}
    config = {"zero_optimization": zero, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    Path("ds_config.json").write_text(json.dumps(config))
    assert main(words) == 0
    assert "offload" in json.loads(Path("new_config.json").read_text())
