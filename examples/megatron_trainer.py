"""`train_gpt.py --framework megatron`: the same run by megatron-core's schedules and optimizer.

What offloading takes is three calls: `wrap_model`, `wrap_forward_step`, `build_optimizer`.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from data import Batch, Corpus, evenly_spaced
from loaders import Order, open_loader
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from offloading import require_drives
from optimizers import learning_rate
from torch._C._distributed_c10d import HashStore

from offload.config import Plan, read_plan
from offload.integrations.megatron import (
    build_optimizer,
    close_optimizer,
    require_for_megatron,
    session_of,
    wrap_forward_step,
    wrap_model,
)

__all__ = ["MegatronTrainer", "plan_of"]

_OF_ACTIVATIONS = (
    *("min_tensor_bytes", "staging_bytes", "host_bytes", "spill_bytes", "io_engine"),
    *("memory_bytes", "tolerated_slowdown"),
    *("ssd_write_bytes_per_day", "ssd_rated_bytes"),
)
_OF_STATES = ("staging_bytes", "spill_bytes", "ssd_write_bytes_per_day", "io_engine")


def plan_of(args: argparse.Namespace) -> Plan:
    """Return what `--plan` says, or the flags.

    Raises ValueError for what Megatron does not do by a plan, OSError for an unusable directory.
    """
    if args.model not in ("gpt", "llama"):
        raise ValueError(f"--model {args.model} is not here with --framework megatron; take gpt")
    _require_ranks(args)
    if args.plan == "auto" or args.offload == "auto":
        raise ValueError(
            "auto orders the layers of plain PyTorch; with --framework megatron give a file of "
            "perfmodel plan --framework megatron, or --offload ssd"
        )
    if args.plan:
        plan = read_plan(args.plan)
        _require_this_run(plan, args)
        args.offload_path = list(getattr(plan.activations.offload, "path", ())) or args.offload_path
        args.micro_batch = plan.micro_batch or args.micro_batch
        args.grad_accum = plan.accumulation or args.grad_accum
        return plan
    if args.offload == "host" and not torch.cuda.is_available():
        raise ValueError("tier='host' is for tensors of a GPU, and there is none")
    if args.offload == "ssd" or "ssd" in (args.optimizer_placement or ""):
        require_drives(args)
    found: dict[str, Any] = {"version": 1}
    if args.offload in ("ssd", "host"):
        found["activations"] = {"mode": args.offload, **_settings(args, _OF_ACTIVATIONS)}
        if args.offload == "ssd":
            found["activations"]["path"] = args.offload_path
    if args.optimizer == "offload":
        where = args.optimizer_placement or "auto"
        found["optimizer"] = {"placement": where}
        if "ssd" in where:
            found["optimizer"] |= {"path": args.offload_path, **_settings(args, _OF_STATES)}
    return Plan.from_mapping(found)


def _require_ranks(args: argparse.Namespace) -> None:
    """Raise ValueError for parts that ranks, heads or layers cannot be shared by."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    parts = args.tensor_parallel * args.pipeline_parallel
    for flag, whole, what, part in (
        ("--tensor-parallel x --pipeline-parallel", ranks, "ranks", parts),
        ("--tensor-parallel", args.heads, "heads", args.tensor_parallel),
        ("--pipeline-parallel", args.layers, "layers", args.pipeline_parallel),
    ):
        if whole % part:
            raise ValueError(f"{flag} is {part}, which does not divide {whole} {what}")


def _require_this_run(plan: Plan, args: argparse.Namespace) -> None:
    """Raise ValueError for a plan of another step, or another model."""
    require_for_megatron(None, plan)
    sequences = args.micro_batch * args.grad_accum
    if plan.micro_batch and plan.accumulation and plan.micro_batch * plan.accumulation != sequences:
        raise ValueError(
            f"--plan {args.plan} has micro_batch={plan.micro_batch} x accumulation="
            f"{plan.accumulation}, and the flags {sequences} sequences a step"
        )
    of = plan.workload.of if plan.workload is not None else None
    if of is None:
        return
    here = {"num_layers": args.layers, "hidden_size": args.hidden, "num_heads": args.heads}
    here |= {"seq_len": args.seq_len, "tensor": args.tensor_parallel}
    here["pipeline"] = args.pipeline_parallel
    said = {**of["model"], **of["parallel"], **of}
    differing = [
        f"{key} is {said[key]} in the plan and {value} here"
        for key, value in here.items()
        if said[key] != value
    ]
    if differing:
        raise ValueError(f"--plan {args.plan} was made for another run: {'; '.join(differing)}")


def _settings(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


class MegatronTrainer:
    """What one rank trains with, and one step of it."""

    def __init__(
        self,
        args: argparse.Namespace,
        corpus: Corpus,
        plan: Plan,
        resources: contextlib.ExitStack,
    ) -> None:
        self.args, self.corpus = args, corpus
        self.device = _joined(args, resources)
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        copies = parallel_state.get_data_parallel_world_size()
        self.tokens_per_step = args.micro_batch * args.grad_accum * args.seq_len * copies
        self.data_rank = parallel_state.get_data_parallel_rank()
        order = Order(
            corpus.train, args.seq_len, args.micro_batch, args.grad_accum, args.seed, self.data_rank
        )
        self.batches = open_loader(args.loader, order, self.device)
        self.model = [_made(args, corpus.vocab_size)]
        self.bare = self.model[0]
        wrap_model(self.model, plan)
        self.optimizer = build_optimizer(_optimizer_config(args), self.model, plan)
        resources.callback(close_optimizer, self.optimizer)
        session = session_of(self.model)
        self.act = None if session is None else session.activations
        if session is not None:
            resources.callback(session.close)
        self.forward_step = wrap_forward_step(_forward_step(args, self.device), self._count)
        self._num_micro_batches = args.grad_accum

    def _count(self) -> int:
        count: int = self._num_micro_batches
        return count

    def resident_bytes(self) -> int:
        """Return what stays between steps on the device; states where Megatron's own are."""
        found = sum(each.nbytes + each.main_grad.nbytes for each in self.bare.parameters())
        for each in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            inner = each.optimizer
            memory: Callable[[], int] | None = getattr(inner, "memory_bytes", None)
            main = getattr(each, "shard_fp32_from_float16_groups", None)
            main = main or getattr(each, "fp32_from_float16_groups", None) or []
            found += sum(one.nbytes for group in main for one in group if one is not None)
            if memory is not None:
                found += memory()
                continue
            states = [value for some in inner.state.values() for value in some.values()]
            found += sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
        return int(found)

    def step(self, step: int) -> float:
        """Train on the batch of this step and return its loss, the mean over all ranks."""
        args = self.args
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        self.bare.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self._run(self.batches, args.grad_accum, args.micro_batch)
        self.optimizer.step()
        return loss

    @torch.no_grad()
    def validate(self) -> float:
        """Return the loss on text that is never trained on, the mean over all ranks."""
        args, rows = self.args, self.args.micro_batch
        copies = parallel_state.get_data_parallel_world_size()
        count = max(1, 32 // (rows * copies))
        windows = evenly_spaced(
            self.corpus.validation, args.seq_len, count * rows, self.data_rank, copies
        )
        batches = zip(*(torch.split(part, rows) for part in windows), strict=True)
        self.bare.eval()
        loss = self._run(batches, count, rows, forward_only=True)
        self.bare.train()
        return loss

    def _run(
        self, batches: Iterator[Batch], count: int, rows: int, *, forward_only: bool = False
    ) -> float:
        """Have Megatron's schedule do a step's forwards and backwards; return the mean loss."""
        self._num_micro_batches = count
        found = get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=batches,
            model=self.model,
            num_microbatches=count,
            seq_length=self.args.seq_len,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        # The last stage has it.
        losses = [each["loss"] for each in found] or [torch.zeros((), device=self.device)]
        total = torch.stack(losses).sum() / count
        dist.all_reduce(total)
        sharers = self.num_ranks // parallel_state.get_pipeline_model_parallel_world_size()
        return float(total.item() / sharers)


def _joined(args: argparse.Namespace, resources: contextlib.ExitStack) -> torch.device:
    """Have Megatron's groups of ranks, without torchrun those of one; return this rank's device."""
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=0))
    if not dist.is_initialized():
        dist.init_process_group(store=HashStore(), rank=0, world_size=1)
        resources.callback(dist.destroy_process_group)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_parallel,
        pipeline_model_parallel_size=args.pipeline_parallel,
    )
    resources.callback(parallel_state.destroy_model_parallel)
    torch.manual_seed(args.seed)
    model_parallel_cuda_manual_seed(args.seed + 1)
    return torch.device(torch.cuda.current_device())


def _dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if args.dtype == "bf16" else torch.float32


def _made(args: argparse.Namespace, vocab_size: int) -> DistributedDataParallel:
    """Return this rank's stage of the model, in Megatron's wrappers."""
    bf16, llama = args.dtype == "bf16", args.model == "llama"
    shape: dict[str, Any] = {"ffn_hidden_size": 4 * args.hidden}
    if llama:
        shape = {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False}
        shape["activation_func"] = torch.nn.functional.silu
    if args.offload == "recompute":
        shape |= {"recompute_granularity": "full", "recompute_method": "uniform"}
        shape["recompute_num_layers"] = 1
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        tensor_model_parallel_size=args.tensor_parallel,
        pipeline_model_parallel_size=args.pipeline_parallel,
        pipeline_dtype=_dtype(args),
        params_dtype=_dtype(args),
        bf16=bf16,
        hidden_dropout=args.dropout,
        attention_dropout=args.dropout,
        use_cpu_initialization=True,  # the same first weights on every machine
        # Fused kernels of Transformer Engine and Apex, which need not be there.
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        **shape,
    )
    config.finalize_model_grads_func = finalize_model_grads
    parts = args.tensor_parallel
    model: Any = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=config.normalization),
        vocab_size=-(-vocab_size // parts) * parts,
        max_sequence_length=args.seq_len,
        position_embedding_type="rope" if llama else "learned_absolute",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).to(torch.cuda.current_device())
    model = Float16Module(config, model) if bf16 else model
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=bf16, use_distributed_optimizer=True, overlap_grad_reduce=False
    )
    return DistributedDataParallel(config, settings, model)


def _optimizer_config(args: argparse.Namespace) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=args.max_norm,
        bf16=args.dtype == "bf16",
        params_dtype=_dtype(args),
        use_distributed_optimizer=True,
    )


def _forward_step(args: argparse.Namespace, device: torch.device) -> Callable[..., Any]:
    places = torch.arange(args.seq_len, device=device)[None]
    later = torch.ones(1, 1, args.seq_len, args.seq_len, dtype=torch.bool, device=device).triu(1)

    def loss_of(output: torch.Tensor) -> Any:
        loss = output.float().mean()
        # A copy: the schedule divides what is returned by the number of micro-batches, in place.
        return loss, {"loss": loss.detach().clone()}

    def forward_step(batches: Iterator[Batch], model: Any) -> Any:
        tokens, successors = (part.to(device) for part in next(batches))
        return model(tokens, places.expand_as(tokens), later, labels=successors), loss_of

    return forward_step
