"""The examples' memory meter: exact to the byte against patterns whose peak is known."""

from __future__ import annotations

import pytest
import torch

from examples.memory import StepMemory, process_peak_bytes, resident_bytes, worst_live_bytes


def test_the_worst_moment_of_a_known_pattern_is_exact() -> None:
    before = torch.empty(5000, dtype=torch.uint8)
    with StepMemory() as memory:
        first = torch.empty(3000, dtype=torch.uint8)
        second = torch.empty(2000, dtype=torch.uint8)
        del first, before
        third = torch.empty(1000, dtype=torch.uint8)
        del second, third
    assert memory.peak_bytes == 5000


def test_views_and_writes_in_place_cost_nothing() -> None:
    tensor = torch.zeros(100, 100)
    with StepMemory() as memory:
        tensor.t().add_(1)
        tensor[5:].zero_()
    assert memory.peak_bytes <= 64  # at most the scalars themselves


def test_what_autograd_saves_is_seen() -> None:
    x = torch.ones(1000, requires_grad=True)
    with StepMemory() as memory:
        y = x.exp()  # saves its result
        z = y.exp()
        y = y.detach()
        del y
        z.sum().backward()
        del z
    # Both results, the sum, its gradient (expanded), and one gradient after the other.
    assert memory.peak_bytes >= 2 * 4000 + 4
    assert memory.peak_bytes <= 4 * 4000 + 64


def test_the_same_step_measures_the_same_every_time() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    batch = torch.randn(32, 64)

    def step() -> int:
        with StepMemory() as memory:
            model(batch).square().mean().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        return memory.peak_bytes

    step()
    peaks = {step() for _ in range(5)}
    assert len(peaks) == 1
    assert peaks.pop() > 3 * batch.nbytes


def test_an_error_in_the_block_passes_through_and_ends_the_watching() -> None:
    def fail() -> None:
        with StepMemory():
            raise ValueError("from inside")

    with pytest.raises(ValueError, match="from inside"):
        fail()
    with StepMemory() as memory:
        after = torch.empty(128, dtype=torch.uint8)
    assert memory.peak_bytes == after.nbytes


@pytest.mark.parametrize(
    ("changes", "peak"), [([], 0), ([-5], 0), ([4, -4, 3], 4), ([-10, 4, 8], 2), ([1, 2, 3], 6)]
)
def test_the_worst_live_bytes_of_a_curve(changes: list[int], peak: int) -> None:
    assert worst_live_bytes(changes) == peak


def test_resident_bytes_are_parameters_gradients_buffers_and_state() -> None:
    model = torch.nn.BatchNorm1d(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parameters, buffers = 2 * 40, 2 * 40 + 8
    assert resident_bytes(model, optimizer) == parameters + buffers
    model(torch.randn(4, 10)).sum().backward()
    assert resident_bytes(model, optimizer) == 2 * parameters + buffers
    optimizer.step()
    assert resident_bytes(model, optimizer) == 3 * parameters + buffers


def test_the_process_peak_rises_when_more_is_touched_than_ever() -> None:
    before = process_peak_bytes()
    touched = torch.ones(before, dtype=torch.uint8)
    assert process_peak_bytes() > max(before, touched.nbytes)
