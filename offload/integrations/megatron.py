"""Megatron-core by a plan: its activations in every pipeline schedule, and its optimizer's states.

Nothing of Megatron's is replaced: a model gets an attribute, the forward step is a function around
the user's own, and the optimizer that Megatron has built gets ours as its inner one.
"""

from __future__ import annotations

import functools
import logging
import os
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import get_megatron_optimizer

from offload.config import Plan, read_plan
from offload.integrations.main_params import MainParamsAdamW
from offload.integrations.pipeline import Pipeline
from offload.session import Session

__all__ = [
    "MainParamsAdamW",
    "add_arguments",
    "build_optimizer",
    "close_optimizer",
    "require_for_megatron",
    "session_of",
    "wrap_forward_step",
    "wrap_model",
]

_log = logging.getLogger(__name__)
_NAME = "offload_pipeline"
"""Of the attribute that a model chunk gets."""
_STEP = "offload_wraps"
"""Of the attribute that a forward step gets."""
PlanLike = str | os.PathLike[str] | Mapping[str, Any] | Plan


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the group `offload`; return the parser, as Megatron's `extra_args_provider` does."""
    group = parser.add_argument_group("offload")
    group.add_argument(
        "--offload-plan",
        metavar="FILE",
        help="train by this plan (perfmodel plan --framework megatron -o FILE)",
    )
    return parser


def wrap_model(model: Any, plan: PlanLike) -> Any:
    """Have what the model's forwards save go where the plan says; return the model.

    `model`: a module, or a list of a rank's chunks, under Megatron's own wrappers or not. They
    share one `Session`, which `session_of(model)` returns and whoever calls this closes; None where
    the plan leaves activations alone. Raises ValueError for what cannot work with the plan, OSError
    for a directory that cannot be used.
    """
    plan = _plan_of(plan)
    chunks = list(model) if isinstance(model, Sequence) else [model]
    for chunk in chunks:
        require_for_megatron(_config_of(chunk), plan)
    if plan.activations.offload is None:
        return model
    open_session = session_of(model)
    if open_session is not None and not _is_closed(open_session):
        raise ValueError("the model is wrapped already: close session_of(model) first")
    pipeline = Pipeline(Session(torch.nn.ModuleList(chunks), plan), len(chunks))
    for number, chunk in enumerate(chunks):
        setattr(_innermost(chunk), _NAME, (pipeline, number))
        _innermost(chunk).register_forward_pre_hook(pipeline.meet)
    return model


def session_of(model: Any) -> Session | None:
    """Return what `wrap_model` has opened for a model or its chunks."""
    chunk = model[0] if isinstance(model, Sequence) else model
    found = getattr(_innermost(chunk), _NAME, None)
    return None if found is None else found[0].session


def _is_closed(session: Session) -> bool:
    act = session.activations
    return act is None or act.closed


def wrap_forward_step(
    forward_step: Callable[..., Any], num_microbatches: Callable[[], int] = get_num_microbatches
) -> Callable[..., Any]:
    """Return a forward step whose saved tensors leave, and come back for their own backward.

    `forward_step` as Megatron's schedules call it: `(data_iterator, model)`, and whether to
    checkpoint; what its loss function saves behind the model is not covered. `num_microbatches`
    says how many a step has: with it the order of backwards is known before they come.
    """

    if getattr(forward_step, _STEP, False):
        raise ValueError("the forward step is wrapped already: wrap it once")

    @functools.wraps(forward_step)
    def stepped(data_iterator: Any, model: Any, *more: Any, **named: Any) -> Any:
        found = getattr(_innermost(model), _NAME, None)
        if found is None or not torch.is_grad_enabled():
            return forward_step(data_iterator, model, *more, **named)
        pipeline, chunk = found
        if pipeline.begins:
            pipeline.expect(**_pipeline_of(model, _count(num_microbatches)))
        with pipeline.forward(chunk) as key:
            output, loss = forward_step(data_iterator, model, *more, **named)
        pipeline.follow(key, output)
        return output, loss

    setattr(stepped, _STEP, True)
    return stepped


def _count(num_microbatches: Callable[[], int]) -> int | None:
    try:
        return num_microbatches()
    except AttributeError:  # Megatron's calculator was not set up
        return None


def _pipeline_of(model: Any, count: int | None) -> dict[str, Any]:
    """Return how Megatron's schedules have the pipeline run."""
    group = getattr(_config_of(model), "microbatch_group_size_per_vp_stage", None)
    return {
        "stages": parallel_state.get_pipeline_model_parallel_world_size(),
        "rank": parallel_state.get_pipeline_model_parallel_rank(),
        "micro_batches": count,
        "group": group,
    }


def build_optimizer(config: Any, model_chunks: Sequence[Any], plan: PlanLike, **named: Any) -> Any:
    """Return `get_megatron_optimizer(config, model_chunks, **named)` with states by the plan.

    `named` as that takes it. `close_optimizer` gives its files back. Raises ValueError for an
    optimizer that is not AdamW, or another's offloading beside it.
    """
    plan = _plan_of(plan)
    if plan.optimizer is not None:
        _require_adamw(config, model_chunks)
    built = get_megatron_optimizer(config, list(model_chunks), **named)
    if plan.optimizer is not None:
        for each in getattr(built, "chained_optimizers", [built]):
            if getattr(each, "optimizer", None) is not None:
                each.optimizer = _in_place_of(each.optimizer, plan)
    return built


def close_optimizer(optimizer: Any) -> None:
    """Give back memory and files of what `build_optimizer` has returned; states are lost."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(each.optimizer, MainParamsAdamW):
            each.optimizer.close()


def _in_place_of(stock: Any, plan: Plan) -> MainParamsAdamW:
    """Return ours for the groups of one that has taken no step: torch's AdamW, or a fused Adam."""
    assert plan.optimizer is not None
    if stock.state:
        raise ValueError("the optimizer has states already; build it anew, and load them into ours")
    defaults = {key: stock.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    ours = MainParamsAdamW([torch.nn.Parameter(torch.empty(0))], plan.optimizer, **defaults)
    # As the distributed optimizer does: parts of parameters are views, which none is made of.
    ours.param_groups = [{**ours.defaults, **group} for group in stock.param_groups]
    ours.prepare((group, group["params"]) for group in ours.param_groups)
    return ours


def require_for_megatron(config: Any, plan: Plan) -> None:
    """Raise ValueError for what cannot work beside the plan, with what to remove."""
    if plan.tokens.mode != "off":
        raise ValueError(
            f"tokens.mode={plan.tokens.mode!r} is for Hugging Face causal language models, and "
            "Megatron's make their loss themselves: leave the section tokens out"
        )
    if plan.activations.mode == "recompute" or plan.activations.recompute:
        raise ValueError(
            "the plan runs layers again, which Megatron does by --recompute-granularity full: set "
            "that (perfmodel plan --emit megatron says how), and leave mode and recompute out"
        )
    if plan.activations.offload is None:
        return
    for key in ("fine_grained_activation_offloading", "cpu_offloading"):
        if getattr(config, key, False):
            raise ValueError(f"{key}=True and the plan both move activations: remove the first")
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        raise ValueError(
            "overlap_moe_expert_parallel_comm=True runs forwards behind the forward step, where "
            "no plan reaches them: remove it, or the plan's section activations"
        )


def _require_adamw(config: Any, model_chunks: Sequence[Any]) -> None:
    """Raise ValueError for an optimizer that the plan's states are not of."""
    if config.optimizer != "adam" or not config.decoupled_weight_decay:
        raise ValueError(
            f"optimizer={config.optimizer!r} with decoupled_weight_decay="
            f"{config.decoupled_weight_decay} is not AdamW, which is all that the plan's section "
            "optimizer trains with; take the section out"
        )
    beside = [
        key
        for key in ("optimizer_cpu_offload", "use_precision_aware_optimizer")
        if getattr(config, key, False)
    ]
    settings = (getattr(chunk, "ddp_config", None) for chunk in model_chunks)
    if any(getattr(each, "use_megatron_fsdp", False) for each in settings):
        beside.append("use_megatron_fsdp")
    for key in beside:
        raise ValueError(
            f"{key}=True and the plan's section optimizer both place states: remove it"
        )


def _config_of(model: Any) -> Any:
    return getattr(_innermost(model), "config", None)


def _innermost(model: Any) -> Any:
    """Return a model without Megatron's wrappers (DDP, Float16Module)."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _plan_of(plan: PlanLike) -> Plan:
    if isinstance(plan, Plan):
        return plan
    return Plan.from_mapping(plan) if isinstance(plan, Mapping) else read_plan(Path(plan))
