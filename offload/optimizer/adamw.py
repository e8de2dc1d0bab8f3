"""AdamW whose states lie in memory or on the SSD, with the same bits wherever they are."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from offload.config import OptimizerConfig
from offload.device.updates import UpdateDevice
from offload.native import FaultPlan
from offload.optimizer.accepted import (
    TORCHS,
    listed,
    pool_of,
    require_norm,
    require_settings,
    require_trainable,
    settings_of,
    tensors_of,
    updates_beside,
    without_torchs,
)
from offload.optimizer.calibration import with_subgroup_params
from offload.optimizer.checkpoint import (
    Fill,
    Saved,
    assembled,
    from_memory,
    groups_of,
    require_fitting,
    spread,
)
from offload.optimizer.checkpoint_file import CheckpointFile, save_states
from offload.optimizer.device_side import DeviceSide
from offload.optimizer.gradients import Gradients
from offload.optimizer.host_side import HostSide
from offload.optimizer.interruption import Uninterrupted
from offload.optimizer.layout import Piece, Subgroup, lay_out, needs_master, require_as_laid_out
from offload.optimizer.lent_device import LentDevice, made_of
from offload.optimizer.placement import Placement
from offload.optimizer.sharded import require_unsharded, sum_over_ranks, written
from offload.optimizer.states import States
from offload.optimizer.update import Update

__all__ = ["AdamW"]


class AdamW(torch.optim.Optimizer):
    """Takes the place of `torch.optim.AdamW`, with the arithmetic of its fused version on a CPU.

    For fp32 that gives its bits, but for what its vector loop leaves over at an array's end.
    Parameters of lower precision have an fp32 master copy, which is what is trained; what somebody
    else has changed of a parameter is taken over into its copy at the next step. `placement` and
    the settings after it are those of `OptimizerConfig`. With `early_gradients` a step uses up the
    gradients, and a backward that is not to count is followed by this `zero_grad()`, not the
    model's. `max_norm` clips the norm of all gradients together. A step whose gradients are not all
    finite is skipped and counted in `skipped_steps`; with `skip_nonfinite=False` it is taken, for
    who decides that elsewhere. `fused` and `foreach` are taken and mean nothing. Parameters of a
    GPU are updated there and here, as `update_schedule` says; `emulated_device` has those of the
    CPU treated so, and a `LentDevice` is `lent_device`: both stay their owner's.

    Raises ValueError for a wrong setting or a parameter that cannot be trained so, OSError with
    errno and path for a directory that cannot be used or has too little space.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = True,
        placement: str = "auto",
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
        io_engine: str | FaultPlan = "auto",
        emulated_device: UpdateDevice | None = None,
        lent_device: UpdateDevice | None = None,
        **settings: Any,
    ) -> None:
        faults = io_engine if isinstance(io_engine, FaultPlan) else None
        settings = without_torchs(settings) | {"placement": placement, "path": path}
        settings["io_engine"] = "auto" if faults is not None else io_engine
        self.config = OptimizerConfig.from_mapping(settings)
        require_norm(max_norm)
        self.max_norm, self._skip_nonfinite = max_norm, skip_nonfinite
        self.skipped_steps, self.total_norm = 0, 0.0
        """The norm is of all gradients of the last step, before clipping; NaN where not needed."""
        pool, params = pool_of(self.config), listed(params)
        self._subgroups: list[tuple[Subgroup, States]] = []
        self._steps: dict[torch.Tensor, int] = {}
        self._versions: dict[torch.Tensor, tuple[int, int]] = {}  # when master copies were made
        self._unfinished: Update | None = None
        self._half_loaded = False
        self._own_device = updates_beside(params) if emulated_device is None else None
        device = self._own_device or emulated_device
        self.config = with_subgroup_params(self.config, tensors_of(params), device, pool)
        self.device_side = (  # None without a device
            DeviceSide(device, pool, self.config) if device is not None else None
        )
        self._gradients = Gradients(device, pool, self.config)
        self._placement = Placement(self.config, faults, self.device_side)
        lent = made_of(lent_device, pool, self.config, device)
        self._host_side = HostSide(pool, self._placement, lent)
        opened = self._gradients, lent, self._placement, self._own_device
        self._finalizer = weakref.finalize(self, _close, *opened)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        try:
            super().__init__(params, TORCHS | defaults | {"maximize": maximize})
        except BaseException:
            self.close()
            raise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as `torch.optim.Optimizer.add_param_group`.

        Raises ValueError for those that cannot be trained so, OSError where there is no room.
        """
        super().add_param_group(param_group)
        number = len(self.param_groups) - 1
        group = self.param_groups[number]
        try:
            require_settings(group)
            for param in group["params"]:
                require_trainable(param, self._own_device)
            size = self.config.subgroup_params
            assert size is not None  # since it was made
            laid_out = lay_out(
                number, group["params"], size, all_masters=self.device_side is not None
            )
            self._subgroups += zip(laid_out, self._placement.states_of(laid_out), strict=True)
            self._gradients.watch(group["params"])
        except BaseException:
            self.param_groups.pop()
            raise

    # ---- the step ---------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        An error leaves the step half done, and says how far it came: another call finishes it, with
        the same gradients, which must not have changed; it does not call `closure`. Raises OSError
        for a failing drive, RuntimeError for a sparse gradient or one of another type, or changed
        gradients. A signal's handler runs between two subgroups, or at the end of a whole step:
        what it raises there loses nothing.
        """
        loss = None
        self._require_open()
        if closure is not None and self._unfinished is None:
            with torch.enable_grad():
                loss = closure()
        self.step_of(self._params())
        return loss

    @torch.no_grad()
    def step_of(self, params: Sequence[torch.Tensor], *, settle: bool = True) -> None:
        """Do what `step()` does for some of the parameters, as frameworks show them.

        Without `settle` what is written may be under way when this returns.
        """
        self._require_open()
        with Uninterrupted() as signals:
            if self._unfinished is None:
                self._unfinished = self._begun(params)
            if self._unfinished is not None:
                self._finish(self._unfinished, signals, settle)
                self._unfinished = None

    def _begun(self, params: Sequence[torch.Tensor]) -> Update | None:
        """Return what this step is to do, or None when it does nothing."""
        self._require_whole()
        shown = [param for param in params if param.grad is not None]
        require_as_laid_out((subgroup for subgroup, _ in self._subgroups), shown)
        # A pass over all gradients, to clip them or to skip a step.
        needed = self._skip_nonfinite or self.max_norm is not None
        gradients = self._gradients.of_step(params, squares=needed)
        square = sum_over_ranks(gradients.squares) if needed else math.nan
        self.total_norm = math.sqrt(square) if math.isfinite(square) else square
        if not math.isfinite(square) and self._skip_nonfinite:
            self.skipped_steps += 1
            self._gradients.drop()
            return None
        clip = 1.0
        if self.max_norm is not None:
            # As torch.nn.utils.clip_grad_norm_ has it.
            clip = min(1.0, self.max_norm / (self.total_norm + 1e-6))
        settings = [settings_of(group) for group in self.param_groups]
        trained = [param for param in gradients.flat if self._has_master(param)]
        stale = {param for param in trained if self._is_foreign(param)}
        for param in gradients.flat:
            self._steps[param] = self._steps.get(param, 0) + 1
            self.state[param]["step"] = torch.tensor(float(self._steps[param]))
        self._gradients.use_up()
        return Update(gradients, dict(self._steps), settings, clip, stale)

    def _is_foreign(self, param: torch.Tensor) -> bool:
        """Say whether somebody else has written the parameter since its master copy was made."""
        return self._versions.get(param) != written(param)

    def _finish(self, update: Update, signals: Uninterrupted, settle: bool) -> None:
        update.require_unchanged()
        try:
            if self.device_side is not None:
                self.device_side.finish(update, self._subgroups, self._gradients, signals)
            else:
                self._host_side.finish(update, self._subgroups, signals)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; {len(update.done)} of {len(self._subgroups)} subgroups are "
                "updated, the others are as they were: where the cause can be put right, call "
                "step() again to finish this step, with the same gradients",
                error.filename,
            ) from error
        finally:
            if settle:
                self._placement.settle()
        self._gradients.take_back()
        self._versions.update(
            (param, written(param)) for param in update.gradients.flat if self._has_master(param)
        )

    def _has_master(self, param: torch.Tensor) -> bool:
        """Say whether a parameter has a copy that is trained in its stead."""
        return needs_master(param) or self.device_side is not None

    def plan_updates(self) -> None:
        """Set aside what a lent device needs, which is else done in the first step."""
        if self._host_side.lent is not None:
            self._host_side.lent.plan(self._subgroups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that were taken included."""
        super().zero_grad(set_to_none)
        self._gradients.drop()

    # ---- checkpoints ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return `torch.optim.AdamW`'s own, and `master_param` beside it for lower precision.

        All states are copied into memory. Raises RuntimeError while a step is half done.
        """
        self._settle()
        for param, states in assembled(self._subgroups, self._steps).items():
            self.state[param].update(states)
        try:
            return super().state_dict()
        finally:
            for param in self._steps:
                step = self.state[param]["step"]
                self.state[param] = {"step": step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a checkpoint of this class or of `torch.optim.AdamW`.

        Where it has no `master_param` for a parameter of lower precision, the parameter is taken.
        Raises ValueError for other groups, shapes or keys, before anything is changed.
        """
        self._take_over(state_dict, from_memory)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all states to the file `path`, in safetensors, with only a subgroup in memory.

        Raises ValueError where ranks have parts of parameters: `torch.distributed.checkpoint`
        saves those, by `state_dict()`.

        The last checkpoint there stays until the new one is whole and on the drive, also when the
        process is killed. Tensors are called `0.exp_avg`, by the parameter's number in a
        `state_dict()`. Raises RuntimeError while a step is half done, OSError with the path.
        """
        self._settle()
        groups = super().state_dict()["param_groups"]
        params = require_unsharded(self._params())
        numbers = {param: number for number, param in enumerate(params)}
        ahead = self._placement.ahead
        save_states(Path(path), groups, numbers, self._steps, self._subgroups, ahead)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over what `save()` wrote, at any placement, with only a subgroup in memory.

        Raises ValueError where the file is something else or of other parameters, OSError with the
        path where it cannot be read or its bytes have changed: before anything is changed.
        """
        params = require_unsharded(self._params())
        with CheckpointFile(Path(path)) as file:
            file.verify()
            outline = file.outline()
            numbers = dict(zip(params, _numbers(outline["param_groups"]), strict=False))

            def fill(piece: Piece, name: str, elements: torch.Tensor) -> None:
                file.read_piece(f"{numbers[piece.param]}.{name}", piece, elements)

            try:
                self._take_over(outline, lambda _saved: fill)
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}: {error}") from None

    def _params(self) -> list[torch.Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _take_over(self, state_dict: Mapping[str, Any], source: Callable[[Saved], Fill]) -> None:
        """Load a checkpoint whose elements `source` brings; those of `state_dict` are not used."""
        self._require_open()
        params = self._params()
        groups = [{**self.defaults, **group} for group in groups_of(state_dict)]
        for group in groups:
            require_settings(group)
        saved = require_fitting(state_dict, params)
        numbers = _numbers(groups)
        steps = {
            number: {"step": torch.tensor(float(saved[param]["step"]))}
            for number, param in zip(numbers, params, strict=True)
            if param in saved
        }
        fill = source(saved)
        # Nothing was wrong so far, and a step that is half done is still one.
        self._settle(loading=True)
        self._placement.let_go()
        self._half_loaded = True
        super().load_state_dict({**state_dict, "param_groups": groups, "state": steps})
        self._steps = {param: int(each["step"]) for param, each in saved.items()}
        # Whoever trained on from the checkpoint may have changed parameters and not their copies.
        self._versions = {}
        spread(self._subgroups, saved, fill)
        self._half_loaded = False

    def memory_bytes(self) -> int:
        """Return what states, all staging and early gradients take in memory between steps."""
        states_bytes = sum(states.memory_bytes() for _, states in self._subgroups)
        moving_bytes = self.device_side.memory_bytes() if self.device_side is not None else 0
        held_bytes = self._placement.native_bytes() + self._gradients.memory_bytes()
        lent = self._host_side.lent
        return states_bytes + moving_bytes + held_bytes + (lent.memory_bytes() if lent else 0)

    def ssd_write_bytes(self) -> int:
        """Return what was written to the SSD so far."""
        return int(self._placement.counters()["write_bytes"])

    # ---- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for the I/O and free the space on the SSD; what is there is lost. Idempotent."""
        self._finalizer()

    def _require_open(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this AdamW is closed; make a new one")
        self._placement.require_owner()

    def _settle(self, *, loading: bool = False) -> None:
        """Have all states where the host may look at them, none half done, and no write failed."""
        self._require_whole(loading=loading)
        self._placement.settle()
        if self.device_side is not None:
            self.device_side.settle()

    def __getstate__(self) -> Any:
        """Refuse to be copied or pickled, with the memory and the files that are its own."""
        raise TypeError("AdamW cannot be copied or pickled; use state_dict() or save()")

    def _require_whole(self, *, loading: bool = False) -> None:
        self._require_open()
        if self._unfinished is not None and (loading or self._unfinished.can_begin_again()):
            self._unfinished.uncount(self._steps, self.state)
            self._gradients.take_back()
            self._unfinished = None
        if self._half_loaded and not loading:
            raise RuntimeError("a checkpoint was loaded in part; load it, or another one, first")
        if self._unfinished is not None:
            raise RuntimeError(
                f"a step is half done ({len(self._unfinished.done)} of {len(self._subgroups)} "
                "subgroups); call step() again to finish it first"
            )


def _close(*opened: Gradients | LentDevice | Placement | UpdateDevice | None) -> None:
    """Close all in their order, whatever one of them raises."""
    with ExitStack() as stack:
        for each in reversed(opened):
            if each is not None:
                stack.callback(each.close)


def _numbers(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return what a checkpoint calls its parameters."""
    return [number for group in groups for number in group["params"]]
