"""A plan for a run: read from a file, or made for this machine; what it says stands for flags."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

from flags import byte_size
from models import Run, call, recompute
from torch import Tensor

from offload.config import Limits, Plan, read_plan
from offload.session import plan_here, require_offered
from perfmodel.plain_models import plain_model
from perfmodel.workload import Parallel, Workload

__all__ = ["add_plan_flags", "follow_plan", "recompute_some"]


def add_plan_flags(add: Callable[..., object]) -> None:
    """List the flags of plans."""
    which = "a plan.json of `perfmodel plan -o`, or auto: measure this machine once, and plan"
    add("--plan", metavar="FILE", help=which)
    most = "what all of a step may take of the device, with --plan auto; without, all there is"
    add("--device-memory", type=byte_size, metavar="SIZE", help=most)


def workload_of(args: argparse.Namespace, vocab_size: int, num_ranks: int) -> Workload:
    """Return what a run trains. Raises ValueError for what no plan can be made for."""
    if args.dtype != "fp32":
        raise ValueError("--plan is made for --dtype fp32; autocast is not predicted yet")
    model = plain_model(
        args.model,
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=args.heads,
        seq_len=args.seq_len,
        vocab_size=vocab_size,
        dropout=args.dropout,
    )
    return Workload(
        model=model,
        seq_len=args.seq_len,
        micro_batch=args.micro_batch,
        accumulation=args.grad_accum,
        dtype="float32",
        parallel=Parallel(data=num_ranks),
        plain=args.model,
    )


def follow_plan(args: argparse.Namespace, vocab_size: int, num_ranks: int) -> Plan | None:
    """Put what `--plan` says into `args` and return it; None without.

    Raises ValueError for a wrong plan, one for another run, or when nothing fits, and OSError.
    """
    args.planned_activations = args.planned_optimizer = {}
    args.optimizer_path = []
    if args.device_memory is not None and args.plan != "auto":
        raise ValueError("--device-memory is a limit for --plan auto; a file has its own")
    if args.plan is None:
        return None
    workload = workload_of(args, vocab_size, num_ranks)
    if args.plan == "auto":
        limits = Limits(device_bytes=args.device_memory)
        plan = plan_here(workload, limits, tuple(args.offload_path))
    else:
        plan = read_plan(args.plan)
        if plan.micro_batch and plan.accumulation:
            sequences = workload.micro_batch * workload.accumulation
            if plan.micro_batch * plan.accumulation != sequences:
                raise ValueError(
                    f"--plan {args.plan} has micro_batch={plan.micro_batch} x accumulation="
                    f"{plan.accumulation}, and the flags {sequences} sequences a step"
                )
            workload = workload.with_batch(plan.micro_batch)
        plan.check_workload(workload)
        require_offered(plan)
    args.micro_batch, args.grad_accum = workload.micro_batch, workload.accumulation
    activations, optimizer = plan.activations, plan.optimizer
    args.offload = {"keep": "none"}.get(activations.mode, activations.mode)
    args.recompute = activations.recompute
    if activations.offload is not None:
        args.memory_bytes = activations.offload.memory_bytes
        args.offload_path = list(activations.offload.path) or args.offload_path
        args.planned_activations = _settings(activations.offload, "tier", "path")
    args.optimizer = "torch" if optimizer is None else "offload"
    if optimizer is not None:
        args.optimizer_placement = optimizer.placement
        if optimizer.placement == "auto":
            [args.optimizer_placement] = optimizer.shares
        args.optimizer_path = list(optimizer.path)
        args.planned_optimizer = _settings(optimizer, "placement", "path")
    return plan


def _settings(section: Any, *but: str) -> dict[str, Any]:
    """Return what a section of a plan says beside a few: it comes before what flags say.

    Flags stand where it leaves a thing open.
    """
    return {
        name: value
        for name, value in asdict(section).items()
        if name not in but and value is not None and (name, value) != ("io_engine", "auto")
    }


def recompute_some(numbers: Collection[int], blocks: int) -> Run:
    """Return what runs the layers of those numbers again, of so many in each forward."""
    turns = itertools.count()

    def run(layer: Run, *inputs: Tensor) -> Tensor:
        again = next(turns) % blocks in numbers
        return (recompute if again else call)(layer, *inputs)

    return run
