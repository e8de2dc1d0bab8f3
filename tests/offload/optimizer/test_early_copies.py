"""Copies of gradients under way beside a backward: nothing waits for them, and sums are exact."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.config import OptimizerConfig
from offload.device.emulated_updates import EmulatedUpdates
from offload.native import ThreadPool, squared_norm
from offload.optimizer.gradients import Gradients


class Stubborn(EmulatedUpdates):
    """A device whose copies of gradients wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def copy(self, queue: str, *rest: Any) -> Any:
        source, target, after = rest
        return super().copy(queue, source, target, (*after, self))  # type: ignore[arg-type]

    def query(self) -> bool:
        return self.go.is_set()

    def synchronize(self) -> None:
        self.go.wait()


def test_a_backward_does_not_wait_for_its_copies() -> None:
    device = Stubborn()
    param = torch.nn.Parameter(torch.zeros(1000))
    gradients = Gradients(
        device, ThreadPool(1), OptimizerConfig(early_gradients=True, subgroup_params=100)
    )
    gradients.watch([param])
    gradients.leave_for_host([param])
    (param * 2).sum().backward()  # comes back although nothing has been copied
    assert param.grad is None
    device.go.set()
    for _ in range(2):  # it stays until it is used up
        found = gradients.of_step([param])
        assert torch.equal(found.on_host[param], torch.full((1000,), 2.0))
    gradients.use_up()
    assert not gradients.of_step([param]).flat
    gradients.close()
    device.close()
    assert not device.pinned


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    plan=st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=4),
    leaving=st.sets(st.integers(0, 4)),
    accumulate=st.sampled_from([None, "float32", "float16"]),
    seed=st.integers(0, 1000),
)
def test_any_order_of_backwards_gives_the_sums(
    counts: list[int],
    plan: list[list[int]],
    leaving: set[int],
    accumulate: str | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.zeros(count, dtype=torch.bfloat16)) for count in counts]
    device = EmulatedUpdates()
    config = OptimizerConfig(early_gradients=True, accumulate_dtype=accumulate, subgroup_params=100)
    gradients = Gradients(device, ThreadPool(1), config)
    gradients.watch(params)
    gradients.leave_for_host([param for number, param in enumerate(params) if number in leaving])
    for step in plan:
        sums: dict[torch.Tensor, torch.Tensor] = {}
        for number in step:
            param = params[number % len(params)]
            factor = torch.randn(param.shape, generator=generator).bfloat16()
            (param * factor).sum().backward()
            dtype = torch.bfloat16 if accumulate is None else getattr(torch, accumulate)
            if param in sums:
                sums[param] += factor
            else:
                sums[param] = factor.to(dtype)
        found = gradients.of_step(params)
        assert [*found.flat] == [param for param in params if param in sums]
        for param, expected in sums.items():
            assert torch.equal(found.flat[param], expected)
            assert found.squares[param] == squared_norm(ThreadPool(1), expected)
        gradients.use_up()
        gradients.take_back()
    gradients.close()
    device.close()


def test_copies_that_fail_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    device = EmulatedUpdates()
    param = torch.nn.Parameter(torch.zeros(1000))
    gradients = Gradients(
        device, ThreadPool(1), OptimizerConfig(early_gradients=True, subgroup_params=100)
    )
    gradients.watch([param])
    gradients.leave_for_host([param])
    param.sum().backward()
    copy = device.copy

    def failing(*_: Any) -> Any:
        raise RuntimeError("the device has gone")

    monkeypatch.setattr(device, "copy", failing)
    for _ in range(5):  # more often than there are buffers
        with pytest.raises(RuntimeError, match="the device has gone"):
            param.sum().backward()
        param.grad = None
    monkeypatch.setattr(device, "copy", copy)
    param.sum().backward()
    assert torch.equal(gradients.of_step([param]).flat[param], torch.full((1000,), 2.0))
    gradients.close()
    device.close()
