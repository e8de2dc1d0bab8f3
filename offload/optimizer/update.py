"""One step as it is under way: its gradients, its settings, and which subgroups have been done."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

from offload.native import AdamSettings
from offload.optimizer.gradients import StepGradients

__all__ = ["Update"]


class Update:
    """What a step does to all subgroups, so that it can be finished after an error."""

    def __init__(
        self,
        gradients: StepGradients,
        steps: Mapping[torch.Tensor, int],
        settings: Sequence[AdamSettings],
        clip: float,
        stale: set[torch.Tensor],
    ) -> None:
        self.gradients = gradients
        self._versions = {param: grad._version for param, grad in gradients.given.items()}
        self.steps = steps
        """Of each parameter, this one included."""
        self.settings = settings
        """Of each group."""
        self.clip = clip
        self.stale = stale
        """Parameters whose master copy is to be made anew."""
        self.has_changed = False
        """Whether any of the states have."""
        self.done: set[int] = set()
        """Numbers of subgroups that are updated, on their way or there."""
        self.pieces: set[tuple[int, int]] = set()
        """Numbers of a subgroup not done, and of its pieces that are."""

    def can_begin_again(self) -> bool:
        """Say whether nothing has changed, and parameters still have all gradients themselves."""
        return not self.has_changed and self.gradients.given.keys() == self.gradients.flat.keys()

    def uncount(
        self, steps: dict[torch.Tensor, int], state: MutableMapping[Any, dict[str, Any]]
    ) -> None:
        """Have this step, which has changed nothing or is to be replaced, not be begun."""
        for param in self.gradients.flat:
            steps[param] -= 1
            state[param]["step"] = torch.tensor(float(steps[param]))
            if not steps[param]:
                del steps[param], state[param]

    def require_unchanged(self) -> None:
        """Raise RuntimeError where a gradient is another one than when the step began."""
        for param, grad in self.gradients.given.items():
            if param.grad is not grad or grad._version != self._versions[param]:
                raise RuntimeError(
                    f"the gradient of a parameter of shape {tuple(param.shape)} has changed since "
                    "a step failed midway, which cannot be finished without it; put it back and "
                    "call step() again, or load() a checkpoint, which takes that step's place"
                )
