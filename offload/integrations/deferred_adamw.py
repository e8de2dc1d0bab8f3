"""AdamW for a framework that trains other tensors than it was given parameters.

DeepSpeed takes an optimizer of the model's parameters, and puts flat fp32 partitions of its own in
their place once it has it. So states are made of what is in the groups when they are first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from offload.config import OptimizerConfig
from offload.device.updates import UpdateDevice
from offload.optimizer import AdamW
from offload.optimizer.accepted import TORCHS, listed, require_settings

__all__ = ["DeferredAdamW"]

_OF_A_GROUP = ("lr", "betas", "eps", "weight_decay", "maximize")


class DeferredAdamW(torch.optim.Optimizer):
    """`offload.AdamW` of whatever tensors the groups have at a step, placed as `config` says.

    A step updates those in the groups that have a gradient, so that a framework may show some after
    the others. Gradients that are not finite are the framework's to skip: it has the loss scale,
    and the other ranks. `state` has the count of steps alone; `state_dict()` has all.

    Raises ValueError for settings that AdamW does not have.
    """

    def __init__(
        self,
        params: Iterable[Any],
        config: OptimizerConfig,
        *,
        lr: float,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self.config = config
        self.lent_device: UpdateDevice | None = None
        """Updates some of what lies in host memory; to be set before states are made."""
        self.holds_errors = False
        """Whether a step that finds no room for states does nothing, until `raise_held`."""
        self._held: OSError | None = None
        self._states: AdamW | None = None
        self._groups: dict[torch.Tensor, int] = {}  # of `_states`, by tensor
        # What `_states` trains in the stead of a tensor: itself, or the same memory as a leaf.
        self._leaves: dict[torch.Tensor, torch.Tensor] = {}
        self._failed = ""  # what a step that is half done failed with
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        defaults["bias_correction"] = True  # which DeepSpeed's own ask of a checkpoint
        # Of no class between: one that is torch's AdamW as well has settings of its own.
        whole = TORCHS | defaults | {"maximize": False}
        torch.optim.Optimizer.__init__(self, listed(params), whole)
        for group in self.param_groups:
            require_settings(group)

    def prepare(self, groups: Iterable[tuple[Mapping[str, Any], Sequence[torch.Tensor]]]) -> None:
        """Make the states of tensors not seen before, each with a group that has their settings.

        Raises ValueError for a tensor that cannot be trained, OSError where there is no room.
        """
        fresh = []
        for settings, params in groups:
            new = [param for param in params if param not in self._groups]
            if new:
                self._leaves |= {each: _leaf_of(each) for each in new}
                leaves = [self._leaves[each] for each in new]
                chosen = {key: settings[key] for key in _OF_A_GROUP}
                fresh.append((new, {"params": leaves, **chosen}))
        if self._states is None and fresh:
            self._states = self._made([group for _, group in fresh])
        elif self._states is not None:
            for _, group in fresh:
                self._states.add_param_group(group)
        for number, (new, _) in enumerate(fresh, len(set(self._groups.values()))):
            self._groups |= dict.fromkeys(new, number)
        if self._states is not None and fresh:
            self._states.plan_updates()

    def raise_held(self) -> None:
        """Raise what steps so far found no room for, and hold nothing back any more."""
        self.holds_errors = False
        if self._held is not None:
            raise self._held

    def _made(self, groups: Sequence[Mapping[str, Any]]) -> AdamW:
        on_host = all(not param.is_cuda for group in groups for param in group["params"])
        return AdamW(
            groups,
            skip_nonfinite=False,
            lent_device=self.lent_device if on_host else None,
            **asdict(self.config),
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update what is in the groups and has a gradient.

        Raises OSError for a failing drive: the step is half done then, and since frameworks change
        the gradients that they call it with, only a checkpoint leads on from there.
        """
        if closure is not None:
            raise ValueError("closure is not offered where a framework calls the step")
        if self._failed:
            raise RuntimeError(f"{self._failed}: load a checkpoint first")
        self._take_over()
        params = [param for group in self.param_groups for param in group["params"]]
        trained = [param for param in params if param.grad is not None]
        if not trained:
            return None
        try:
            states = self._prepared()
        except OSError as error:
            if not self.holds_errors:
                raise
            self._held = error
            return None
        for group in self.param_groups:
            require_settings(group)
            for number in {self._groups[param] for param in group["params"]}:
                states.param_groups[number].update({key: group[key] for key in _OF_A_GROUP})
        leaves = {param: self._leaves[param] for param in trained}
        for param, leaf in leaves.items():
            leaf.grad = param.grad
        try:
            states.step_of(list(leaves.values()), settle=False)
        except OSError as error:
            why = error.__cause__ if isinstance(error.__cause__, OSError) else error
            self._failed = f"a step failed midway ({why.strerror})"
            said = f"{why.strerror}; the step is half done: load a checkpoint"
            raise OSError(error.errno, said, error.filename) from error
        for param, leaf in leaves.items():
            if leaf is not param:
                leaf.grad = None
            self._counted(param, states.state[leaf]["step"])
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what `torch.optim.AdamW`'s has of the tensors in the groups, copied into memory.

        Raises RuntimeError while a step is half done.
        """
        self._take_over()
        counts = dict(self.state)
        try:
            self.state.update(self._all_states())
            return super().state_dict()
        finally:
            self.state.clear()
            self.state.update(counts)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a checkpoint of this class or of `torch.optim.AdamW`, of the same groups.

        Raises ValueError for other groups, shapes or keys, before anything is changed.
        """
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in groups]
        own = [len(group["params"]) for group in self.param_groups]
        if sizes != own:
            raise ValueError(f"the checkpoint has groups of {sizes} parameters, and here are {own}")
        merged = [{**mine, **_without_params(saved)} for mine, saved in self._with(groups)]
        for group in merged:
            require_settings(group)
        found: dict[torch.Tensor, Mapping[str, Any]] = {}
        for mine, saved in self._with(groups):
            # DeepSpeed's FusedAdam counts the steps of a group's last parameter alone.
            of_group = [state_dict["state"].get(number, {}) for number in saved["params"]]
            most = max((float(each.get("step", 0)) for each in of_group), default=0.0)
            for param, states in zip(mine["params"], of_group, strict=True):
                if states:
                    found[param] = (
                        states if float(states.get("step", 0)) else {**states, "step": most}
                    )
        self._load(found)
        for mine, saved in self._with(groups):
            mine.update(_without_params(saved))

    def memory_bytes(self) -> int:
        """Return what states and staging take in memory between steps."""
        return 0 if self._states is None else self._states.memory_bytes()

    def ssd_write_bytes(self) -> int:
        """Return what was written to the SSD so far."""
        return 0 if self._states is None else self._states.ssd_write_bytes()

    def close(self) -> None:
        """Give back memory and files; states are lost. Idempotent."""
        if self._states is not None:
            self._states.close()

    # ---- states ------------------------------------------------------------------------------

    def _prepared(self) -> AdamW:
        """Return the states of all tensors in the groups."""
        self.prepare((group, group["params"]) for group in self.param_groups)
        if self._states is None:
            raise RuntimeError("no parameter group has a tensor to train")
        return self._states

    def _all_states(self) -> dict[torch.Tensor, dict[str, Any]]:
        """Return all states, copied, by tensor."""
        if self._states is None:
            return {}
        by_number = self._states.state_dict()["state"]
        params = self._params_of(self._states)
        return {params[number]: states for number, states in by_number.items()}

    def _params_of(self, states: AdamW) -> list[torch.Tensor]:
        """Return the tensors that `states` are of, in the order of its numbers."""
        owners = {leaf: param for param, leaf in self._leaves.items()}
        return [owners[leaf] for group in states.param_groups for leaf in group["params"]]

    def _load(self, found: Mapping[torch.Tensor, Mapping[str, Any]]) -> None:
        """Have these states and no others."""
        if not found and self._states is None:
            return  # of tensors that may not be the ones to train yet
        states = self._prepared()
        outline = torch.optim.Optimizer.state_dict(states)
        params = self._params_of(states)
        numbered = {number: found[each] for number, each in enumerate(params) if each in found}
        states.load_state_dict({"param_groups": outline["param_groups"], "state": numbered})
        self._failed = ""
        self.state.clear()
        for param in found:
            self._counted(param, states.state[self._leaves[param]]["step"])

    def _take_over(self) -> None:
        """Take over states that a framework has put into `state` itself, from a checkpoint.

        Those of tensors that have not been shown yet stay where they are until they are.
        """
        given = self._given()
        if not given:
            return
        shown = {param for group in self.param_groups for param in group["params"]}
        known = {
            each: states for each, states in given.items() if each in shown | self._groups.keys()
        }
        if known:
            others = self._all_states() if self._groups.keys() - known.keys() else {}
            self._load({**others, **known})
            self.state.update({each: given[each] for each in given.keys() - known.keys()})

    def _given(self) -> dict[torch.Tensor, dict[str, Any]]:
        """Return the states that a framework has put into `state`."""
        return {param: states for param, states in self.state.items() if "exp_avg" in states}

    def _counted(self, param: torch.Tensor, step: torch.Tensor) -> None:
        """Note how many steps a tensor has taken."""
        if not isinstance(self.state[param], _Count):
            self.state[param] = _Count(self.state[param])
        self.state[param]["step"] = step

    def _with(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Any, Mapping[str, Any]]]:
        return zip(self.param_groups, groups, strict=True)

    def __getstate__(self) -> Any:
        """Refuse to be copied or pickled, with the memory and the files that are its own."""
        raise TypeError("this AdamW cannot be copied or pickled; use state_dict()")


class _Count(dict[str, Any]):
    """A tensor's count of steps, and a word to whoever asks for the rest of its states.

    A copy of them would take changes and lose them.
    """

    def __missing__(self, key: str) -> Any:
        raise KeyError(
            f"{key} is where the plan's optimizer has it, and not at hand: state_dict() has all of "
            "them, and load_state_dict() takes changes"
        )


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _leaf_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that may be trained: itself, or of the same memory where it is a view."""
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_()
