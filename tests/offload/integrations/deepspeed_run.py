"""Trains with DeepSpeed, one rank of it: what the tests start, for all of their cases at once.

Reads {"cases": {name: case}} and writes {name: {"losses", "parameters", ...}} for its rank. A case
has `config` (DeepSpeed's), `stock` (whether `deepspeed.initialize` itself is called), `steps`,
`save` or `resume` (directories), `states` (whether to tell the optimizer's).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload.integrations.deepspeed import initialize
from offload.integrations.deferred_adamw import DeferredAdamW

WIDTH, DEPTH, ROWS = 32, 3, 64


class Net(nn.Module):
    """Layers whose saved tensors are large enough to leave, and a loss inside."""

    def __init__(self, again: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 1)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean square of what comes out."""
        for layer in self.layers:
            run = nn.Sequential(layer, nn.GELU())
            if self.again == "torch":
                x = checkpoint(run, x, use_reentrant=False)
            elif self.again == "deepspeed":
                x = deepspeed.checkpointing.checkpoint(run, x)
            else:
                x = run(x)
        return self.head(x).float().square().mean()


def digest(tensors: Any) -> str:
    """Return a hash of the bits of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def groups_of(model: nn.Module, several: bool) -> Any:
    """Return parameters, or two groups of which one does not decay."""
    if not several:
        return model.parameters()
    biases = [param for name, param in model.named_parameters() if "bias" in name]
    others = [param for name, param in model.named_parameters() if "bias" not in name]
    return [{"params": others}, {"params": biases, "weight_decay": 0.0, "lr": 2e-3}]


def opened(case: dict[str, Any], model: nn.Module) -> tuple[Any, Any]:
    """Return the engine and a scheduler, if any."""
    config = case["config"]
    params = groups_of(model, case.get("groups", False))
    given: dict[str, Any] = {"model": model, "model_parameters": params, "config": config}
    if case.get("client"):  # ours, where DeepSpeed is left alone
        from offload.config import OptimizerConfig

        placed = OptimizerConfig(placement="device")
        given["optimizer"] = lambda found: DeferredAdamW(found, placed, **case["client"])
    if case.get("scheduled"):
        given["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 / (1 + step)
        )
    start = deepspeed.initialize if case.get("stock") else initialize
    engine, _, _, scheduler = start(**given)
    return engine, scheduler


def trained(case: dict[str, Any]) -> dict[str, Any]:
    """Train; return losses, and hashes of what came of it."""
    torch.manual_seed(1)
    model = Net(case.get("again", ""))
    engine, _ = opened(case, model)
    dtype = next(engine.module.parameters()).dtype
    if case.get("resume"):
        loaded, _ = engine.load_checkpoint(case["resume"])
        assert loaded is not None
    rank = torch.distributed.get_rank()
    losses, times = [], engine.gradient_accumulation_steps()
    first = engine.global_steps * times
    for micro_step in range(first, first + case.get("steps", 3) * times):
        generator = torch.Generator().manual_seed(10 + rank + 100 * micro_step)
        x = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        bits = digest(engine.module.parameters())
    found: dict[str, Any] = {"losses": losses, "parameters": bits}
    if getattr(engine, "offload", None) is not None:
        stats = engine.offload.stats()
        found |= {"offloaded": stats.offloaded_bytes, "passed": dict(stats.passed_through_bytes)}
    found["kept"] = "offload" in engine.config if isinstance(engine.config, dict) else None
    if case.get("save"):
        engine.save_checkpoint(case["save"])
    engine.destroy()
    return found


def main() -> None:
    """Run all cases, each in the same process group."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # What it would build at once, for minutes, to add up among ranks of one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    found: dict[str, Any] = {}
    for name, case in json.loads(arguments.cases.read_text())["cases"].items():
        if case.get("directory_of_rank"):  # that another rank does not have
            section = case["config"]["offload"][case["directory_of_rank"]]
            section["path"] = section["path"][torch.distributed.get_rank()]
        try:
            found[name] = trained(case)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            if not case.get("fails"):
                found[name]["trace"] = traceback.format_exc()
    rank = torch.distributed.get_rank()
    arguments.out.with_suffix(f".{rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # two ranks of gloo may abort at their interpreters' end


if __name__ == "__main__":
    main()
