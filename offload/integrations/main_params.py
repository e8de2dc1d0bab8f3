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
    when that is first done, and kept until the next step, which takes over whatever they have
    become by then. Steps are counted by parameter in a `state_dict()`, as torch's AdamW does, and
    by group, as fused ones do.
    """

    def __init__(self, params: Any, config: OptimizerConfig, **settings: Any) -> None:
        super().__init__(params, config, **settings)
        self.state = _Shown(self)
        self._shows = False

    def state_dict(self) -> dict[str, Any]:
        """Return `torch.optim.AdamW`'s, with the tensors that `state` shows.

        Raises RuntimeError while a step is half done.
        """
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
            of_group = {steps[each] for each in group["params"] if each in steps}
            if len(of_group) == 1:
                group["step"] = int(*of_group)
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
        self._shows = False

    def show(self) -> None:
        """Have `state` show the states of every tensor that has some.

        Raises RuntimeError while a step is half done: a checkpoint of that would be none.
        """
        if self._failed:
            raise RuntimeError(f"{self._failed}: end this run, and resume from a checkpoint")
        if self._shows:
            return
        found, self._shows = self._all_states(), True
        for param in self._groups:
            own, states = self.state.setdefault(param, {}), found.get(param)
            for name in STATE_NAMES if STATE_NAMES[0] not in own else ():
                own[name] = (
                    torch.zeros_like(param, device="cpu") if states is None else states[name]
                )

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
        """Return what has been put into `state`, and what is shown there, changed or not.

        Whether it was changed cannot be told: loaders write through `.data`, which nothing counts.
        """
        self._shows = False
        given = {each: states for each, states in dict.items(self.state) if "exp_avg" in states}
        counts = self._counts() if given else {}
        return {
            param: {"step": torch.tensor(counts.get(param, 0.0)), **states}
            for param, states in given.items()
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
