"""AdamW of Megatron's main parameters, whose checkpoints look into the states of an optimizer."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from offload.config import OptimizerConfig
from offload.integrations.deferred_adamw import DeferredAdamW
from offload.optimizer.layout import STATE_NAMES

__all__ = ["MainParamsAdamW"]


class MainParamsAdamW(DeferredAdamW, torch.optim.AdamW):
    """What Megatron's optimizers take for theirs: of their fp32 main parameters, or parts of them.

    It is a `torch.optim.AdamW` because the distributed optimizer asks whether it is. Whoever looks
    into `state` finds `exp_avg` and `exp_avg_sq` of every parameter there, copied into host memory
    when that is first done, and kept until the next step; what has been changed in place by then is
    taken over. Steps are counted by parameter in a `state_dict()`, as torch's AdamW does, and by
    group, as fused ones do.
    """

    def __init__(self, params: Any, config: OptimizerConfig, **settings: Any) -> None:
        super().__init__(params, config, **settings)
        self.state = _Shown(self)
        self._versions: dict[torch.Tensor, tuple[int, ...]] = {}  # of what is shown

    def state_dict(self) -> dict[str, Any]:
        """Return `torch.optim.AdamW`'s, with the tensors that `state` shows.

        Raises RuntimeError while a step is half done.
        """
        self._take_over()
        found = torch.optim.Optimizer.state_dict(self)
        counts = self._counts()
        params = [param for group in self.param_groups for param in group["params"]]
        numbers = [number for group in found["param_groups"] for number in group["params"]]
        steps = {
            number: counts[param]
            for number, param in zip(numbers, params, strict=True)
            if param in counts
        }
        found["state"] = {
            number: {**states, "step": torch.tensor(steps[number])}
            for number, states in found["state"].items()
            if number in steps
        }
        for group in found["param_groups"]:
            group["step"] = int(max((steps.get(each, 0) for each in group["params"]), default=0))
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a checkpoint of this class, of `torch.optim.AdamW`, or of a fused Adam.

        A count of steps that a group has stands for those of its parameters. Raises ValueError for
        other groups, shapes or keys, before anything is changed.
        """
        states, groups = dict(state_dict["state"]), []
        for group in state_dict["param_groups"]:
            group = dict(group)
            step = group.pop("step", None)
            groups.append(group)
            for number in group["params"] if step is not None else ():
                if number in states:
                    states[number] = {**states[number], "step": torch.tensor(float(step))}
        super().load_state_dict({"state": states, "param_groups": groups})
        self._versions.clear()

    def show(self) -> None:
        """Have `state` show the states of every tensor that has some."""
        if self._versions:
            return
        found = self._all_states()
        for param in self._groups:
            own = self.state.setdefault(param, {})
            if STATE_NAMES[0] in own:
                continue  # from a checkpoint, and not taken over yet
            states = found.get(param)
            for name in STATE_NAMES:
                own[name] = torch.zeros_like(param) if states is None else states[name]
            self._versions[param] = _versions_of(own)

    def _counts(self) -> dict[torch.Tensor, float]:
        """Return how many steps each tensor has taken; without any at all, all of them none."""
        assert self._states is not None or not self._groups
        counts = {
            param: float(self._states.state[leaf]["step"])
            for param, leaf in self._leaves.items()
            if self._states is not None and leaf in self._states.state
        }
        return counts or dict.fromkeys(self._groups, 0.0)

    def _given(self) -> dict[torch.Tensor, dict[str, Any]]:
        """Return what has been put into `state`, or changed there; forget what is only shown."""
        shown = dict(dict.items(self.state))
        for param, versions in self._versions.items():
            own = shown.get(param, {})
            if STATE_NAMES[0] in own and _versions_of(own) == versions:
                del self.state[param]
        counts, self._versions = self._counts() if self._versions else {}, {}
        return {
            param: {"step": torch.tensor(counts.get(param, 0.0)), **states}
            for param, states in dict.items(self.state)
            if STATE_NAMES[0] in states
        }

    def _counted(self, param: torch.Tensor, step: torch.Tensor) -> None:
        """Leave counts to the states themselves."""


class _Shown(defaultdict[torch.Tensor, dict[str, Any]]):
    """The `state` of an optimizer that shows its states to whoever looks."""

    def __init__(self, owner: MainParamsAdamW) -> None:
        super().__init__(dict)
        self._owner = weakref.ref(owner)

    def _show(self) -> None:
        owner = self._owner()
        if owner is not None:
            owner.show()

    def __getitem__(self, param: torch.Tensor) -> dict[str, Any]:
        self._show()
        return super().__getitem__(param)

    def items(self) -> Any:
        self._show()
        return super().items()

    def values(self) -> Any:
        self._show()
        return super().values()

    def __len__(self) -> int:
        """Count those to be shown as well."""
        owner = self._owner()
        return max(super().__len__(), 0 if owner is None else len(owner._groups))


def _versions_of(states: Mapping[str, Any]) -> tuple[int, ...]:
    """Return what changes when states are replaced or written in place."""
    return tuple(each for name in STATE_NAMES for each in (id(states[name]), states[name]._version))
