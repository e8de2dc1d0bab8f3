"""A whole plan, applied to a model: what becomes of activations, and where states lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from offload.activations import ActivationOffload, ActivationStats
from offload.calibrate import present_machine
from offload.config import Limits, Plan, read_plan
from offload.optimizer import AdamW
from offload.tokens import ExactTokens, Quality, SparseTokens, measure_quality
from perfmodel.chosen_plan import plan_of
from perfmodel.machine import Machine
from perfmodel.model import Model
from perfmodel.parameters import rank_parameters
from perfmodel.plan_file import Predicted
from perfmodel.planner import Search
from perfmodel.planner import plan as search_plan
from perfmodel.workload import Parallel, Workload

__all__ = ["Session", "plan_here", "require_no_meter", "require_offered"]

# Of what one rank without a device sends to another: into a socket, out of it, each read and
# written, at both ends.
_COPIES = 8


class Session:
    """A model that trains by a plan. Owns what moves bytes; `close()` it, or use it in a `with`.

    `plan` is the path of a plan, what it says as a mapping, a `Plan`, or `auto`: then this machine
    is measured (once; see `present_machine`), and planned for `workload` within `limits`, with
    `path` on its SSD. Forwards run in `forward()`, layers that may be run again through `block()`.

    Raises ValueError for a plan that is wrong, made for another workload, or when nothing fits;
    OSError for a file or directory that cannot be used.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: str | os.PathLike[str] | Mapping[str, Any] | Plan = "auto",
        *,
        workload: Workload | None = None,
        limits: Limits | None = None,
        path: str | tuple[str, ...] = (),
    ) -> None:
        paths = (path,) if isinstance(path, str) else path
        self.plan = _plan_of(plan, workload, limits, paths)
        if workload is not None:
            self.plan.check_workload(workload)
        require_offered(self.plan)
        require_parameters(self.plan, model)
        section = self.plan.activations
        self._again = section.recompute
        self.activations: ActivationOffload | None = None
        """What moves saved activations; None where they stay."""
        self.tokens: ExactTokens | None = None
        """What has the loss made in segments; None where the model's is whole."""
        if section.offload is not None:
            self.activations = ActivationOffload(**_settings(section.offload))
        self.sparsity: SparseTokens | None = None
        """What leaves tokens out; None where all take part."""
        self._model = model
        self._probe: Mapping[str, Any] | None = None
        self._looked = -1
        try:
            self._cut_tokens()
        except BaseException:
            self.close()
            raise
        self._number = 0  # of the next block of this forward

    def _cut_tokens(self) -> None:
        section = self.plan.tokens
        again = True if self._again or self.plan.activations.mode == "recompute" else None
        settings: dict[str, Any] = {
            "loss_segment_tokens": section.loss_segment_tokens,
            "mlp_tile_tokens": section.mlp_tile_tokens,
            "again": again,
        }
        if section.mode == "exact":
            self.tokens = ExactTokens(self._model, **settings)
        elif section.mode in ("sparse", "gradient"):
            settings["gradient_only"] = section.mode == "gradient"
            self.sparsity = SparseTokens(self._model, section.sparse, **settings)
            self.tokens = self.sparsity.exact

    @property
    def predicted(self) -> Predicted | None:
        """What was expected of a step."""
        return self.plan.predicted

    def forward(self) -> AbstractContextManager[object]:
        """Return the context of one micro-batch's forward."""
        self._number = 0
        return nullcontext() if self.activations is None else self.activations.forward()

    def block(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """Run a layer as the plan says of the block of its number, in the order of a forward."""
        number, self._number = self._number, self._number + 1
        mode = self.plan.activations.mode
        if not torch.is_grad_enabled():
            return layer(*inputs)
        if self.sparsity is not None:  # it may run again, and has to keep the same tokens
            layer = self.sparsity.carrying(layer)
        if mode == "auto" and self._again is None and self.activations is not None:
            return self.activations.block(layer, *inputs)
        again = mode == "recompute" if self._again is None else number in self._again
        if again:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def make_optimizer(self, params: Iterable[Any], **settings: Any) -> AdamW | torch.optim.AdamW:
        """Return AdamW for `params` with its states where the plan has them.

        `settings`: `lr`, `betas`, `eps`, `weight_decay`, and with `offload.AdamW` `max_norm`. The
        caller owns it.
        """
        config = self.plan.optimizer
        if config is None:
            return torch.optim.AdamW(params, fused=True, **settings)
        return AdamW(params, **settings, **_settings(config))

    def stats(self) -> ActivationStats | None:
        """Return what was moved so far; None where nothing is."""
        return None if self.activations is None else self.activations.stats()

    def measure_quality(self, batch: Mapping[str, Any]) -> Quality:
        """Return how far a sparse step on `batch` is from a dense one; past its limit, fall back.

        `batch` is what the model takes, with labels. See `offload.tokens.measure_quality`. Raises
        ValueError where no token is left out.
        """
        if self.sparsity is None:
            raise ValueError("no token is left out: tokens.mode is not sparse")
        return measure_quality(self._model, self.sparsity, batch, around=self.forward)

    def quality_is_due(self) -> bool:
        """Say whether `meter_steps` have gone by, and this step has not been looked at."""
        if self.sparsity is None or not self.sparsity.rule.meter_steps or self.sparsity.is_dense:
            return False
        step = self.sparsity.step
        return step != self._looked and not step % self.sparsity.rule.meter_steps

    def quality_of_probe(self, batch: Mapping[str, Any]) -> Quality:
        """Measure on the first batch that was ever handed over, `batch` if this is the first."""
        assert self.sparsity is not None
        self._looked = self.sparsity.step
        if self._probe is None:
            self._probe = dict(batch)
        return self.measure_quality(self._probe)

    def close(self) -> None:
        """Give back memory and files, and leave the model as it was. Idempotent."""
        if self.sparsity is not None:
            self.sparsity.close()
        if self.tokens is not None:
            self.tokens.close()
        if self.activations is not None:
            self.activations.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.activations is not None:
            self.activations.__exit__(kind, error, trace)  # says why where nothing was moved
        self.close()


def plan_here(workload: Workload, limits: Limits | None = None, path: tuple[str, ...] = ()) -> Plan:
    """Return the best plan for this machine, measured once, by the first rank for all.

    Batches stay as `workload` has them. Raises ValueError if nothing fits, on every rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        return _planned(workload, limits, path)
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [_planned(workload, limits, path).to_json()]
        except Exception as error:  # whatever it is, the others wait for an answer
            known = isinstance(error, (OSError, ValueError))
            answer = [error if known else RuntimeError(f"the first rank has no plan: {error}")]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return Plan.from_mapping(answer[0])


def _planned(workload: Workload, limits: Limits | None, path: tuple[str, ...]) -> Plan:
    whole = present_machine(path[0] if path else None)
    if not path:
        whole = replace(whole, drive=None)
    # Without a device all ranks share one memory; else as many devices as ranks are used.
    ranks = workload.parallel.ranks
    used = ranks if whole.link is None else min(whole.devices, ranks)
    machine = replace(whole, devices=used)
    if ranks > 1:
        machine = replace(machine, network_bytes_per_s=_network(machine))
    found = search_plan(workload, machine, limits, _as_given(workload))
    if not found.choices:
        over = ", ".join(f"{key} by {nbytes}" for key, nbytes in (found.over or {}).items())
        raise ValueError(f"no plan fits: over {over}; {found.change}")
    return plan_of(found.choices[0].prediction, whole, path=path, limits=limits)


def _network(machine: Machine) -> float:
    """Return what ranks send each other, where that was not measured: by way of the host."""
    if machine.network_bytes_per_s:
        return machine.network_bytes_per_s
    if machine.link is not None:
        return machine.link.to_device_bytes_per_s
    return machine.host.memory_bytes_per_s / _COPIES


def require_offered(plan: Plan) -> None:
    """Raise ValueError for what a plan may say and no run does yet."""
    if plan.report is not None:
        raise ValueError(f"report={plan.report!r} is not written yet; leave it out")


def require_no_meter(plan: Plan, why: str) -> None:
    """Raise ValueError where quality is to be measured every so often by who does not do it."""
    rule = plan.tokens.sparse
    if rule is not None and rule.meter_steps:
        raise ValueError(
            f"tokens.sparse.meter_steps={rule.meter_steps}: {why}, or leave it out and call "
            "measure_quality of a Session between steps"
        )


def require_parameters(plan: Plan, model: torch.nn.Module) -> None:
    """Raise ValueError unless `model` has as many parameters as the one that was planned for."""
    of = plan.workload.of if plan.workload is not None else None
    if of is None:
        return
    parallel = of["parallel"]
    shared = any(parallel[key] > 1 for key in ("tensor", "pipeline")) or of["lora_rank"]
    if shared or parallel["zero_stage"] == 3:
        return  # a rank has a part of the model, or adapters beside it
    parts = {"model": Model(**of["model"]), "parallel": Parallel(**parallel)}
    expected = sum(each.count for each in rank_parameters(Workload(**{**of, **parts})))
    found = sum(param.numel() for param in model.parameters())
    if found != expected:
        raise ValueError(
            f"the plan was made for a model of {expected} parameters, and this one has {found}; "
            "make it for this one (perfmodel plan)"
        )


def _as_given(workload: Workload) -> Search:
    return Search(micro_batches=(workload.micro_batch,))


def _settings(config: Any) -> dict[str, Any]:
    return asdict(config)


def _plan_of(
    plan: str | os.PathLike[str] | Mapping[str, Any] | Plan,
    workload: Workload | None,
    limits: Limits | None,
    path: tuple[str, ...],
) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):
        return Plan.from_mapping(plan)
    if plan != "auto":
        return read_plan(Path(plan))
    if workload is None:
        raise ValueError("plan='auto' needs workload=, what is to be trained; or name a plan.json")
    return plan_here(workload, limits, path)
