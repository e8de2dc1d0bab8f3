"""What PyTorch's vector loop leaves over at an array's end, where bits may differ from ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

SIZE, STEPS = 7, 10


@pytest.mark.parametrize("count", [1000, pytest.param(15000, marks=pytest.mark.soak)])
def test_a_step_of_tails_has_torchs_moments_and_its_parameters_within_four_ulp(
    adamw: Callable[..., Any], count: int
) -> None:
    generator = torch.Generator().manual_seed(0)

    def values(low: float, high: float) -> list[torch.Tensor]:
        powers = torch.empty(count).uniform_(low, high, generator=generator)
        return [10**power * torch.randn(SIZE, generator=generator) for power in powers]

    mine, torchs = ([torch.nn.Parameter(each.clone()) for each in values(-3, 1)] for _ in range(2))
    ours = adamw(mine, weight_decay=0.1)
    theirs = torch.optim.AdamW(torchs, weight_decay=0.1, fused=True)
    for _ in range(STEPS):  # each from the same states
        with torch.no_grad():
            torch._foreach_copy_(torchs, mine)
        before = torch.cat(mine).detach().abs()
        for one, other, grad in zip(mine, torchs, values(-4, 2), strict=True):
            one.grad, other.grad = grad, grad.clone()
        ours.step()
        theirs.step()
        states, others = ours.state_dict()["state"], theirs.state_dict()["state"]
        for number in range(count):
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(states[number][name], others[number][name])
        after, expected = torch.cat(mine).detach(), torch.cat(torchs).detach()
        # Of the larger of what there was and what is there now: a difference may come out as zero.
        ulp = torch.maximum(before, after.abs()) * 2**-23
        assert ((after - expected).abs() <= 4 * ulp).all()
        assert (after == expected).float().mean() > 0.97
        theirs.load_state_dict(ours.state_dict())
