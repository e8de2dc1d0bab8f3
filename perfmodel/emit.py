"""What frameworks are configured with for a workload, a strategy and its plan.

DeepSpeed's JSON and the arguments of Hugging Face's Trainer; `emit_megatron` has Megatron's flags.
What a framework cannot be told is refused, in one line.
"""

from __future__ import annotations

from typing import Any

from perfmodel.plan_file import Plan
from perfmodel.workload import Strategy, Workload

__all__ = [
    "emit_deepspeed",
    "emit_transformers",
    "recomputed_layers",
    "require_of_deepspeed",
    "require_of_transformers",
]


LEARNING_RATE = 1e-4
"""Stands in for the user's."""


def recomputed_layers(workload: Workload, strategy: Strategy) -> tuple[int, ...]:
    """Return the numbers of the layers that are run again, of all stages, from 0.

    Raises ValueError for one that the model does not have.
    """
    layers = workload.model.num_layers + workload.model.encoder_layers
    if strategy.recompute is None:
        return tuple(range(layers)) if strategy.activations == "recompute" else ()
    for number in strategy.recompute:
        if not 0 <= number < layers:
            raise ValueError(f"recompute has layer {number}; there are {layers}, from 0")
    return tuple(sorted(strategy.recompute))


def emit_deepspeed(workload: Workload, strategy: Strategy, plan: Plan) -> dict[str, Any]:
    """Return a whole DeepSpeed config (0.19), with `plan` under the key `offload`.

    `offload.integrations.deepspeed.initialize` takes it as it is: layers that run again are
    DeepSpeed's or the model's own to do, and the learning rate stands in for the user's. Where
    states are on the host or the SSD, DeepSpeed is to keep its own part of them, the fp32
    parameters, on the host (`offload_optimizer`), and what is given to the optimizer moves as the
    plan says. Raises ValueError where DeepSpeed cannot be told so.
    """
    plan.check_workload(workload)
    parallel = workload.parallel
    require_of_deepspeed(workload, strategy)
    if (plan.optimizer is None) != (strategy.optimizer == "torch"):
        raise ValueError(f"optimizer={strategy.optimizer!r} is not that of the plan")
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": workload.micro_batch,
        "gradient_accumulation_steps": workload.accumulation,
        "bf16": {"enabled": workload.dtype == "bfloat16"},
        "fp16": {"enabled": workload.dtype == "float16"},
        "zero_optimization": zero,
        # An optimizer that DeepSpeed does not know is taken as it is, and not replaced by its own.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if "device" not in strategy.shares:
        zero["offload_optimizer"] = {"device": "cpu"}
    if parallel.tensor > 1:
        found["tensor_parallel"] = {"autotp_size": parallel.tensor}
    else:  # Without an `mpu`, DeepSpeed takes all ranks for ranks of data when it checks this.
        found["train_batch_size"] = workload.micro_batch * workload.accumulation * parallel.data
    if parallel.context > 1:
        found["data_parallel_size"] = parallel.data
        found["sequence_parallel_size"] = parallel.context
    layers = recomputed_layers(workload, strategy)
    if layers:
        found["activation_checkpointing"] = {"number_checkpoints": len(layers)}
    if parallel.pipeline > 1:
        found["pipeline"] = {
            "stages": parallel.pipeline,
            "activation_checkpoint_interval": int(bool(layers)),
        }
    if plan.optimizer is not None:
        found["optimizer"] = {"type": "AdamW", "params": {"lr": LEARNING_RATE}}
    return found | {
        "offload": _section(plan, again=strategy.activations == "recompute" or bool(layers))
    }


def _section(plan: Plan, *, again: bool) -> dict[str, Any]:
    """Return a plan as it stands in a config that says itself which layers run `again`."""
    section = plan.to_json()
    if again:
        activations = dict(section["activations"])
        activations.pop("recompute", None)
        kept = {"mode": "keep"} if activations.get("mode") == "recompute" else {}
        section["activations"] = activations | kept
    return section


def require_of_deepspeed(workload: Workload, strategy: Strategy) -> None:
    """Raise ValueError where DeepSpeed cannot be told what is meant."""
    parallel, shares = workload.parallel, strategy.shares
    layers = recomputed_layers(workload, strategy)
    whole = len(layers) in (0, workload.model.num_layers + workload.model.encoder_layers)
    problem = ""
    if parallel.sequence:
        problem = "sequence=True is not in DeepSpeed, whose ranks of `context` share sequences"
    elif parallel.tensor > 1 and parallel.zero_stage == 3:
        problem = f"tensor={parallel.tensor} goes with zero_stage 0, 1 or 2 in DeepSpeed, not 3"
    elif parallel.chunks > 1:
        problem = f"chunks={parallel.chunks}: DeepSpeed's pipelines do not interleave"
    elif parallel.pipeline > 1 and parallel.zero_stage > 1:
        problem = (
            f"zero_stage={parallel.zero_stage} does not go with pipeline={parallel.pipeline} in "
            "DeepSpeed; at most 1"
        )
    elif parallel.pipeline > 1 and (parallel.tensor > 1 or parallel.context > 1):
        problem = (
            f"pipeline={parallel.pipeline} goes with tensor=1 and context=1 only in a DeepSpeed "
            "config"
        )
    elif parallel.tensor > 1 and parallel.context > 1:
        problem = (
            f"tensor={parallel.tensor} does not go with context={parallel.context} in a DeepSpeed "
            "config"
        )
    elif parallel.pipeline > 1 and not whole:
        problem = (
            f"recompute={layers} of a pipeline: DeepSpeed runs all layers of a stage again, or none"
        )
    elif strategy.early_gradients:
        problem = "early_gradients takes gradients that DeepSpeed adds up itself"
    elif "device" in shares and len(shares) > 1:
        problem = (
            f"placement={strategy.placement!r}: DeepSpeed has all fp32 parameters on the device, "
            "or none"
        )
    elif "device" not in shares and parallel.zero_stage == 0:
        problem = (
            f"placement={strategy.placement!r} needs zero_stage 1, 2 or 3 with DeepSpeed, not 0"
        )
    if problem:
        raise ValueError(problem)


def emit_transformers(workload: Workload, strategy: Strategy) -> dict[str, Any]:
    """Return keyword arguments of Hugging Face's `TrainingArguments` (transformers 5).

    Under DeepSpeed its config is one more, `deepspeed=`. Raises ValueError where they cannot say
    what is meant.
    """
    require_of_transformers(workload, strategy)
    layers = recomputed_layers(workload, strategy)
    found: dict[str, Any] = {
        "per_device_train_batch_size": workload.micro_batch,
        "gradient_accumulation_steps": workload.accumulation,
        "bf16": workload.dtype == "bfloat16",
        "fp16": workload.dtype == "float16",
        "gradient_checkpointing": bool(layers),
    }
    if layers:
        # Reentrant ones need an input with a gradient, which tokens are not.
        found["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if strategy.optimizer == "torch":
        found["optim"] = "adamw_torch"
    return found


def require_of_transformers(workload: Workload, strategy: Strategy) -> None:
    """Raise ValueError where a Trainer cannot be told what is meant."""
    parallel = workload.parallel
    for key in ("tensor", "pipeline", "context"):
        if getattr(parallel, key) > 1:
            raise ValueError(f"{key}={getattr(parallel, key)}: a Trainer's ranks share data alone")
    if parallel.zero_stage and workload.framework != "deepspeed":
        raise ValueError(
            f"zero_stage={parallel.zero_stage} of a Trainer needs framework='deepspeed', not "
            f"{workload.framework!r}"
        )
    layers = recomputed_layers(workload, strategy)
    if len(layers) not in (0, workload.model.num_layers + workload.model.encoder_layers):
        raise ValueError(f"recompute={layers}: a Trainer runs all layers again, or none")
