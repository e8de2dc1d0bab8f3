"""The Hugging Face Trainer (transformers 5) by a plan: a callback, or a Trainer of its own.

The callback moves activations: hooks of the model, since callbacks cannot wrap a forward. The
Trainer wraps the loss whole, makes the optimizer, and saves states that memory cannot hold.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from offload.config import Plan, read_plan
from offload.integrations.deepspeed_config import require_compatible, require_for_deepspeed
from offload.integrations.deferred_adamw import DeferredAdamW
from offload.integrations.module_forward import ModuleForward
from offload.integrations.preparation import close_all, prepare_states, require_all
from offload.integrations.trainer_settings import (
    STOCK_NAMES,
    require_arguments,
    require_no_recompute,
    require_no_section,
    require_one_runs_states,
    require_own_loss,
)
from offload.optimizer import AdamW
from offload.session import Session, require_no_meter
from offload.tokens.choice import TokenChoice

__all__ = ["OffloadCallback", "OffloadTrainer", "Offloading"]

_log = logging.getLogger(__name__)
_OPTIMS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
STATES_NAME = "optimizer.safetensors"
"""In a checkpoint's folder, beside the Trainer's own files."""
_SCHEDULER_NAME = "scheduler.pt"
FALLBACK_NAME = "all_tokens.json"
"""In a checkpoint's folder, where all tokens take part from then on."""
PlanLike = str | os.PathLike[str] | Mapping[str, Any] | Plan


class OffloadCallback(transformers.TrainerCallback):
    """Moves what the model's forwards save, by the plan's section `activations`.

    Its logs have what was moved and waited for. What a loss computes behind the model's forward
    (label smoothing, `compute_loss_func`) is not covered. An optimizer of the plan is not made
    here: hand `optimizers=(offload.AdamW(...), None)` to the Trainer, or take `OffloadTrainer`.

    Raises ValueError where the plan says what a callback cannot do.
    """

    def __init__(self, plan: PlanLike) -> None:
        self.plan = _plan_of(plan)
        require_no_recompute(self.plan)
        require_no_meter(self.plan, "a callback takes no forwards of its own: take OffloadTrainer")
        self._session: Session | None = None
        self._hooks: ModuleForward | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        """Open what moves bytes. Raises OSError for a directory that cannot be used."""
        optimizer = _unwrapped(more.get("optimizer"))
        if self.plan.optimizer is not None and not isinstance(optimizer, (AdamW, DeferredAdamW)):
            raise ValueError(
                "the plan has a section optimizer, and the Trainer's is "
                f"{type(optimizer).__name__}: hand optimizers=(offload.AdamW(...), None) to it, or "
                "take OffloadTrainer"
            )
        self.close()
        require_own_loss(self.plan, args)
        require_arguments(self.plan, args)
        section = getattr(getattr(args, "hf_deepspeed_config", None), "config", None)
        if section is not None:
            require_compatible(section, self.plan)
            require_no_section(section)
        error: Exception | None = None
        try:
            self._session = Session(model, self.plan)
        except Exception as caught:  # whatever it is, the other ranks wait for an answer
            error = caught
        require_all(error)
        assert self._session is not None
        if self._session.sparsity is not None:
            self._session.sparsity.follow(lambda: int(state.global_step))
        self._hooks = ModuleForward(model, self._session)
        _log.info("what is computed behind the model's forward, a loss say, is not covered")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Add what was moved to the logs, and to the last of the Trainer's history."""
        found = figures_of(self._session, more.get("optimizer"))
        if logs is not None:
            logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Give back memory and files."""
        self.close()

    def close(self) -> None:
        """Give back memory and files. Idempotent."""
        if self._hooks is not None:
            self._hooks.close()
        if self._session is not None:
            self._session.close()
        self._hooks = self._session = None


class Offloading:
    """What makes a Trainer one that trains by a plan: `class Mine(Offloading, SFTTrainer)`.

    `plan` as for `Session`. Raises ValueError where the Trainer cannot do what it says.
    """

    def __init__(self, *args: Any, plan: PlanLike, **named: Any) -> None:
        self.plan = _plan_of(plan)
        require_no_recompute(self.plan)
        self._session: Session | None = None
        self._lent: list[Any] = []
        super().__init__(*args, **named)
        self._require_trainer()
        if self.plan.optimizer is not None:
            self._require_optimizer()

    def train(self: Any, *args: Any, **named: Any) -> Any:
        """Train as the Trainer does.

        Raises what one rank could not open on all of them: OSError there, RuntimeError elsewhere.
        """
        session: Session | None = None
        error: Exception | None = None
        try:
            require_own_loss(self.plan, self.args, self.compute_loss_func)
            session = Session(self.model, self.plan)
        except Exception as caught:  # whatever it is, the other ranks wait for an answer
            error = caught
        with ExitStack() as stack:
            if session is not None:
                stack.enter_context(session)
            require_all(error)
            self._session = session
            stack.callback(setattr, self, "_session", None)
            if session is not None and session.sparsity is not None:
                session.sparsity.follow(lambda: int(self.state.global_step))
            return super().train(*args, **named)  # type: ignore[misc]

    def close(self: Any) -> None:
        """Give back what the optimizer's states take; they are lost. Idempotent."""
        optimizer = _unwrapped(self.optimizer)
        close_all([each for each in (optimizer, *self._lent) if hasattr(each, "close")])
        self._lent = []

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
        """Take a micro-batch's step; where the plan says so, ask the first batch of it first."""
        if self._session is not None and self._session.quality_is_due():
            found = self._session.quality_of_probe(self._prepare_inputs(inputs))
            self.log(found.figures())
        return super().training_step(model, inputs, *args, **named)  # type: ignore[misc]

    def compute_loss(self: Any, model: Any, *args: Any, **named: Any) -> Any:
        """Compute the loss; all that it saves goes where the plan says."""
        if self._session is None or not torch.is_grad_enabled() or not model.training:
            return super().compute_loss(model, *args, **named)  # type: ignore[misc]
        with self._session.forward():
            return super().compute_loss(model, *args, **named)  # type: ignore[misc]

    def create_optimizer(self: Any, *args: Any, **named: Any) -> Any:
        """Make the plan's optimizer with the Trainer's settings and groups."""
        config = self.plan.optimizer
        if config is None or self.optimizer is not None:
            return super().create_optimizer(*args, **named)  # type: ignore[misc]
        given = self.args
        settings = {
            "lr": given.learning_rate,
            "betas": (given.adam_beta1, given.adam_beta2),
            "eps": given.adam_epsilon,
        }
        groups = self._groups()
        error: Exception | None = None
        try:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # which train other tensors
                self.optimizer = DeferredAdamW(groups, config, **settings)
            else:
                self.optimizer = AdamW(groups, **settings, **asdict(config))
        except Exception as caught:  # whatever it is, the other ranks wait for an answer
            error = caught
        require_all(error)
        return self.optimizer

    def create_scheduler(self: Any, *args: Any, **named: Any) -> Any:
        """Make the scheduler, and the states over DeepSpeed's partitions, which are there by now.

        Before a checkpoint is loaded into them. Raises what one rank has no room for on all.
        """
        made = super().create_scheduler(*args, **named)  # type: ignore[misc]
        engine = getattr(
            getattr(self.accelerator, "deepspeed_engine_wrapped", None), "engine", None
        )
        if self.plan.optimizer is not None and self.is_deepspeed_enabled and engine is not None:
            error: Exception | None = None
            try:
                self._prepare_states(engine)
            except Exception as caught:  # whatever it is, the other ranks wait for an answer
                error = caught
            require_all(error)
        return made

    def _prepare_states(self: Any, engine: Any) -> None:
        optimizer = _unwrapped(self.optimizer)
        if not isinstance(optimizer, DeferredAdamW):
            raise ValueError(
                f"DeepSpeed trains with {type(optimizer).__name__} in the place of the plan's "
                "optimizer: remove its config's section optimizer"
            )
        prepare_states(engine, optimizer, self._lent)

    def log(self: Any, logs: dict[str, Any], *args: Any, **named: Any) -> None:
        """Log what the Trainer does, and what was moved and waited for."""
        super().log(logs | figures_of(self._session, self.optimizer), *args, **named)  # type: ignore[misc]

    # ---- checkpoints -------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if self.args.should_save and self._session is not None:
            save_fallback(Path(output_dir), self._session.sparsity)
        states = self._own_states()
        if states is None:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        elif self.args.should_save:
            folder = Path(output_dir)
            states.save(folder / STATES_NAME)
            torch.save(self.lr_scheduler.state_dict(), folder / _SCHEDULER_NAME)
            for name in STOCK_NAMES:  # of another run's, in the same folder
                (folder / name).unlink(missing_ok=True)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is not None and self._session is not None:
            load_fallback(Path(checkpoint), self._session.sparsity)
        states = self._own_states()
        file = None if checkpoint is None else Path(checkpoint) / STATES_NAME
        if file is not None and file.is_file():
            require_one_runs_states(file)
        if states is None and file is not None and file.is_file():
            raise ValueError(
                f"{file} has the states of a plan's optimizer, and this plan has none, so that "
                "they would be lost: give the plan a section optimizer"
            )
        if states is None or file is None or not file.is_file():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        states.load(file)
        scheduler = torch.load(Path(str(checkpoint)) / _SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)

    def _own_states(self: Any) -> AdamW | None:
        """Return the optimizer where it is ours and has whole parameters."""
        optimizer = _unwrapped(self.optimizer)
        return optimizer if isinstance(optimizer, AdamW) else None

    # ---- what the Trainer has ----------------------------------------------------------------

    def _groups(self: Any) -> list[dict[str, Any]]:
        """Return the Trainer's two groups, of which one does not decay."""
        decaying = set(self.get_decay_parameter_names(self.model))
        named = [(name, each) for name, each in self.model.named_parameters() if each.requires_grad]
        parts = [
            [each for name, each in named if (name in decaying) is yes] for yes in (True, False)
        ]
        decays = (self.args.weight_decay, 0.0)
        return [
            {"params": params, "weight_decay": decay}
            for params, decay in zip(parts, decays, strict=True)
            if params
        ]

    def _require_trainer(self: Any) -> None:
        """Raise ValueError for what cannot work beside the plan; set what DeepSpeed needs."""
        require_arguments(self.plan, self.args)
        if not self.is_deepspeed_enabled:
            return
        if isinstance(self.optimizer, AdamW):
            raise ValueError(
                "with DeepSpeed the Trainer makes another optimizer in the place of the one in "
                "optimizers=: leave it out, and give the plan a section optimizer"
            )
        config = self.accelerator.state.deepspeed_plugin.hf_ds_config.config
        require_no_section(config)
        if self.plan.optimizer is not None and "optimizer" in config:
            raise ValueError(
                "the DeepSpeed config has a section optimizer, which is trained with in the "
                "place of the plan's: remove it, the Trainer's arguments say the same"
            )
        for change in require_for_deepspeed(config, self.plan):
            _log.warning("offload sets in the DeepSpeed config: %s", change)

    def _require_optimizer(self: Any) -> None:
        """Raise ValueError for an optimizer beside the plan's."""
        if self.optimizer is not None:
            raise ValueError(
                "the plan has a section optimizer, and optimizers= hands another one to the "
                "Trainer: leave one out"
            )
        kind = str(getattr(self.args.optim, "value", self.args.optim))
        if kind not in _OPTIMS or self.args.optim_args:
            raise ValueError(
                f"optim={kind!r} is not AdamW, which the plan's section optimizer trains with: "
                "leave optim out, and optim_args"
            )
        if getattr(self, "optimizer_cls_and_kwargs", None) is not None:
            raise ValueError(
                "optimizer_cls_and_kwargs and the plan's section optimizer are two: leave one out"
            )
        if self.plan.optimizer.early_gradients and self.args.max_grad_norm:
            raise ValueError(
                f"early_gradients leaves nothing for max_grad_norm={self.args.max_grad_norm} to "
                "clip: set max_grad_norm=0, or leave early_gradients out"
            )


class OffloadTrainer(Offloading, transformers.Trainer):  # type: ignore[misc]
    """A Trainer that trains by `plan`: activations, optimizer, checkpoints and logs."""


def figures_of(session: Session | None, optimizer: Any) -> dict[str, float]:
    """Return what a log has so far: totals, of activations and states, and what states take now."""
    stats = None if session is None else session.stats()
    found: dict[str, float] = {}
    if stats is not None:
        found = {
            "offloaded_bytes": stats.offloaded_bytes,
            "reloaded_bytes": stats.reloaded_bytes,
            "ssd_write_bytes": stats.ssd_write_bytes,
            "native_peak_bytes": stats.native_peak_bytes,
            "stall_s": stats.stall_s,
        }
    if session is not None and session.sparsity is not None:
        found["kept_share"] = session.sparsity.kept_share
    states = _unwrapped(optimizer)
    if isinstance(states, (AdamW, DeferredAdamW)):
        found["ssd_write_bytes"] = found.get("ssd_write_bytes", 0) + states.ssd_write_bytes()
        found["optimizer_bytes"] = states.memory_bytes()
    return found


def save_fallback(folder: Path, tokens: TokenChoice | None) -> None:
    """Write into a checkpoint that all tokens take part from then on, where they do."""
    file = folder / FALLBACK_NAME
    if tokens is not None and tokens.fallen_back:
        file.write_text(json.dumps({"step": tokens.step}) + "\n", encoding="utf-8")
    else:
        file.unlink(missing_ok=True)  # of another run's, in the same folder


def load_fallback(folder: Path, tokens: TokenChoice | None) -> None:
    """Have all tokens take part where they did when a checkpoint was saved."""
    file = folder / FALLBACK_NAME
    if tokens is not None and file.is_file():
        tokens.fallen_back = True
        _log.warning("all tokens take part, as they did in the run that is resumed (%s)", file)


def _plan_of(plan: PlanLike) -> Plan:
    if isinstance(plan, Plan):
        return plan
    return Plan.from_mapping(plan) if isinstance(plan, Mapping) else read_plan(Path(plan))


def _unwrapped(optimizer: Any) -> Any:
    """Return an optimizer without accelerate's or DeepSpeed's around it."""
    seen: Iterable[str] = ("optimizer", "optimizer")
    for name in seen:
        optimizer = getattr(optimizer, name, None) or optimizer
    return optimizer
