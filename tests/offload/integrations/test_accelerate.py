"""A loop of accelerate's with `offload.Session`: the same bits as without."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload

pytest.importorskip("accelerate")

WIDTH, ROWS = 32, 48


def trained(plan: dict[str, Any]) -> tuple[list[float], str, int]:
    """Train with accumulation and clipping; return losses, a hash, and what was offloaded."""
    from accelerate import Accelerator

    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=8)
    losses = []
    with offload.Session(model, plan) as session:
        optimizer = session.make_optimizer(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for (x,) in loader:
            with accelerator.accumulate(model):
                with session.forward():
                    loss = model(x).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
        stats = session.stats()
    bits = hashlib.sha256()
    for param in model.parameters():
        bits.update(param.detach().numpy().tobytes())
    return losses, bits.hexdigest(), 0 if stats is None else stats.offloaded_bytes


def test_accelerates_loop_has_the_bits_of_no_offload(spill_dir: Path) -> None:
    path = [str(spill_dir)]
    kept = trained({"version": 1, "optimizer": {"placement": "device"}})
    moved = trained(
        {
            "version": 1,
            "activations": {"mode": "ssd", "path": path, "min_tensor_bytes": 512},
            "optimizer": {"placement": "ssd", "path": path, "subgroup_params": 500},
        }
    )
    assert moved[:2] == kept[:2]
    assert moved[2] > 0
