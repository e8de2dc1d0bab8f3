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
import resource
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
)
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import configure_moe_param_groups
from deepspeed.pipe import PipelineModule
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
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


class Mixture(nn.Module):
    """Experts between two layers, one of them for each row."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        expert = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.experts = MoE(WIDTH, expert, num_experts=2, ep_size=ranks, k=1, min_capacity=0)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean square of what comes out, and what evens the experts' loads."""
        x, uneven, _ = self.experts(self.first(x))
        return self.head(x).float().square().mean() + 0.01 * uneven


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
        of = configure_moe_param_groups if case.get("experts") else list
        given["optimizer"] = lambda found: DeferredAdamW(of(found), placed, **case["client"])
    if case.get("plain client"):  # of parameters that ZeRO replaces
        given["optimizer"] = offload.AdamW(model.parameters(), lr=1e-3, placement="device")
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
    ranks = torch.distributed.get_world_size()
    if case.get("pipeline"):
        return piped(case)
    model = Mixture(ranks) if case.get("experts") else Net(case.get("again", ""))
    with limited(case.get("file_bytes", {}).get(str(torch.distributed.get_rank()))):
        return stepped(case, *opened(case, model))


def piped(case: dict[str, Any]) -> dict[str, Any]:
    """Train a pipeline of two stages; return what `trained` does."""
    layers = [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)]
    model = PipelineModule(layers, num_stages=2, loss_fn=lambda out, _: out.square().mean())
    engine, _ = opened(case, model)
    losses = []
    for step in range(case.get("steps", 3)):
        generator = torch.Generator().manual_seed(step)
        rows = [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(4)]
        losses.append(float(engine.train_batch(iter([(x, x) for x in rows]))))
    found: dict[str, Any] = {"losses": losses, "parameters": digest(engine.module.parameters())}
    if getattr(engine, "offload", None) is not None:
        found["offloaded"] = engine.offload.stats().offloaded_bytes
    engine.destroy()
    return found


@contextmanager
def limited(nbytes: int | None) -> Iterator[None]:
    """Have files end at a size, as on a drive that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if nbytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stepped(case: dict[str, Any], engine: Any, _scheduler: Any) -> dict[str, Any]:
    """Take the steps."""
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
        found["kept in memory"] = stats.kept_bytes
    found["kept"] = "offload" in engine.config if isinstance(engine.config, dict) else None
    if case.get("save"):
        save(engine, case, found)
    engine.destroy()
    return found


def save(engine: Any, case: dict[str, Any], found: dict[str, Any]) -> None:
    """Save a checkpoint, and tell what DeepSpeed's own reader of parameters finds in it."""
    told = {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: 0.2}}
    engine.save_checkpoint(case["save"], client_state=told if case.get("universal") else {})
    torch.distributed.barrier()
    if case.get("fp32"):
        names = [name for name, _ in engine.module.named_parameters()]
        states = get_fp32_state_dict_from_zero_checkpoint(case["save"])
        found["fp32"] = digest(states[name] for name in names)


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
