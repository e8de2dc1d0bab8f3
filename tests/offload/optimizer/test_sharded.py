"""Parameters that ranks have parts of (FSDP2, DTensor) are trained as whole ones are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload.optimizer.sharded import as_placed, is_sharded, local_part, sum_over_ranks


def test_two_ranks_have_the_bits_of_one_and_exchange_checkpoints(spill_dir: Path) -> None:
    program = Path(__file__).with_name("sharded_ranks.py")
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *run, str(program), str(spill_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("all ranks agree") == 2
    assert list(spill_dir.iterdir()) == []


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.nn.Parameter(torch.ones(3))])
def test_plain_tensors_are_what_they_are(tensor: torch.Tensor) -> None:
    assert not is_sharded(tensor)
    assert local_part(tensor) is tensor
    assert as_placed(tensor, torch.nn.Parameter(torch.zeros(3))) is tensor
    assert sum_over_ranks({tensor: 2.0, torch.zeros(1): 0.5}) == 2.5
