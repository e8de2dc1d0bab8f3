"""`deepspeed.initialize` for a config with the section `offload`: a plan, and stock DeepSpeed."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from offload.integrations.deepspeed_config import SECTION, DeepSpeedConfig, read_config, split
from offload.integrations.deferred_adamw import DeferredAdamW
from offload.integrations.module_forward import ModuleForward
from offload.integrations.preparation import close_all, prepare_states, require_all
from offload.session import Session, require_no_meter

__all__ = ["initialize"]

_log = logging.getLogger(__name__)


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """Return what `deepspeed.initialize` does; with a section `offload` its plan is applied.

    Without the section it is `deepspeed.initialize`. With it, what forwards of `engine.module` save
    goes where the plan says, and an optimizer in it is `offload.AdamW` over DeepSpeed's fp32
    partitions, with the settings of the config's section `optimizer`. `engine.offload` is the
    `Session`, None where only states move; `engine.destroy()` closes all.

    Raises ValueError for a section that is wrong, or what cannot work beside it; on every rank what
    one of them could not open: OSError there, RuntimeError with its rank elsewhere.
    """
    named = {
        "training_data": training_data,
        "lr_scheduler": lr_scheduler,
        "mpu": mpu,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "mesh_param": mesh_param,
    } | ({} if distributed_port is None else {"distributed_port": distributed_port})
    given = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    found = read_config(next((each for each in (config, config_params, given) if each), None))
    if found is None or SECTION not in found:
        _hint(found or {})
        named |= {"config": config, "config_params": config_params}
        return _stock(args, model, optimizer, model_parameters, named)
    args = _without_config(args, given, config or config_params)
    ours = _ours(found, has_client=optimizer is not None)
    client: list[DeferredAdamW] = []
    if ours.optimizer is not None:
        optimizer = _optimizer_of(ours, model, client)
    named["config"] = ours.stock
    engine, *rest = _stock(args, model, optimizer, model_parameters, named)
    _apply(engine, ours, client)
    return (engine, *rest)


def _ours(config: Mapping[str, Any], *, has_client: bool) -> DeepSpeedConfig:
    """Return a config's parts, and say what is changed in it. Raises ValueError."""
    ours = split(config, has_client=has_client)
    require_no_meter(ours.plan, "an engine is not asked by itself: train by OffloadTrainer")
    for change in ours.changes if _rank() == 0 else ():
        _log.warning("offload sets in the DeepSpeed config: %s", change)
    return ours


def _hint(config: Mapping[str, Any]) -> None:
    """Say that a section may be misspelt, which DeepSpeed takes no notice of.

    Raises ValueError for one that stands inside another section.
    """
    if SECTION in (config.get("zero_optimization") or {}):
        raise ValueError(
            f"zero_optimization.{SECTION}: move the section {SECTION!r} to the top of the config, "
            "beside zero_optimization"
        )
    for close in get_close_matches(SECTION, config, n=1, cutoff=0.75):
        said = "offload: nothing is offloaded: the config has %r, and no section %r; is it that?"
        _log.warning(said, close, SECTION)


def _without_config(args: Any, given: Any, other: Any) -> Any:
    """Return `args` without the config in them, which is handed over by itself."""
    if given is None:
        return args
    if other is not None:
        raise ValueError(f"args.deepspeed_config={given!r} and config= are two; give one")
    args = copy.copy(args)
    args.deepspeed_config = args.deepscale_config = None
    return args


def _stock(
    args: Any, model: Any, optimizer: Any, model_parameters: Any, named: Mapping[str, Any]
) -> tuple[Any, Any, Any, Any]:
    found: tuple[Any, Any, Any, Any] = deepspeed.initialize(
        args, model, optimizer, model_parameters, **named
    )
    return found


def _optimizer_of(
    ours: DeepSpeedConfig, model: Any, client: list[DeferredAdamW]
) -> Callable[[Any], torch.optim.Optimizer]:
    """Return what DeepSpeed makes its optimizer with, of the parameters it has found."""
    config, settings = ours.plan.optimizer, ours.optimizer
    assert config is not None
    assert settings is not None

    def make(params: Any) -> torch.optim.Optimizer:
        if any(getattr(param, "allreduce", True) is False for param in model.parameters()):
            params = _expert_groups(params)
        client.append(DeferredAdamW(params, config, **settings))
        # DeepSpeed may take a step of zeros at once (runtime/fp16/unfused_optimizer.py), in which
        # one rank that has no room would leave the others waiting.
        client[-1].holds_errors = True
        return client[-1]

    return make


def _expert_groups(params: Any) -> Any:
    """Return groups with experts apart, as DeepSpeed has them with an optimizer of its own."""
    from deepspeed.moe.utils import configure_moe_param_groups  # noqa: PLC0415

    return configure_moe_param_groups(params)


def _apply(engine: Any, ours: DeepSpeedConfig, client: Sequence[DeferredAdamW]) -> None:
    """Open what the plan needs, on all ranks or on none."""
    opened: list[Any] = list(client)
    session: Session | None = None
    error: Exception | None = None
    try:
        for optimizer in client:
            optimizer.raise_held()
            prepare_states(engine, optimizer, opened)
        if ours.plan.activations.offload is not None or ours.plan.tokens.mode != "off":
            session = Session(engine.module, ours.plan)
            _follow_steps(engine, session)
            opened += [ModuleForward(engine.module, session), session]
    except Exception as caught:  # whatever it is, the other ranks wait for an answer
        error = caught
    engine.offload = session
    _close_with(engine, opened)
    try:
        require_all(error)
    except Exception:
        engine.destroy()
        raise


def _follow_steps(engine: Any, session: Session) -> None:
    """Have a session count steps as the engine does, which trains copies of its parameters."""
    if session.sparsity is not None:
        found = weakref.ref(engine)
        session.sparsity.follow(lambda: int(getattr(found(), "global_steps", 0)))


def _close_with(engine: Any, opened: Sequence[Any]) -> None:
    """Have `engine.destroy()` close what was opened; the engine's end at the latest."""
    # The engine's own class is DeepSpeed's to choose, so that this one gets a method of its own.
    stock, close = (
        weakref.WeakMethod(engine.destroy),
        weakref.finalize(engine, close_all, list(opened)),
    )

    def destroy() -> None:
        own = stock()
        try:
            if own is not None:
                own()
        finally:
            close()

    engine.destroy = destroy


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
