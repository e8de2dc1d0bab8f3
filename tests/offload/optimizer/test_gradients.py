"""Gradients that leave while the backward goes on: the same bits, bounded, and none lost."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import offload
from offload.device.emulated_updates import EmulatedUpdates
from tests.offload.optimizer.test_adamw import require_equal, states_of

Make = Callable[..., Any]
SCHEDULES = ("host", "device", "share=0.5")
DTYPES = (torch.float32, torch.bfloat16)


def backward(params: list[torch.nn.Parameter], number: int) -> None:
    """Add gradients by autograd, the same ones for the same number."""
    generator = torch.Generator().manual_seed(number)
    factors = [torch.randn(param.shape, generator=generator) for param in params]
    total = sum(
        (param.float() * factor).sum() for param, factor in zip(params, factors, strict=True)
    )
    total.backward()


def trained(
    optimizer: Any, params: list[torch.nn.Parameter], *, micro_batches: int = 1, steps: int = 4
) -> tuple[list[torch.Tensor], Any]:
    """Return parameters and states after some steps."""
    for step in range(steps):
        for number in range(micro_batches):
            backward(params, 10 * step + number)
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in params], states_of(optimizer)


def require_same(found: Any, expected: Any) -> None:
    assert all(map(torch.equal, found[0], expected[0]))
    require_equal(found[1], expected[1])


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_leaving_early_changes_no_bit(
    adamw: Make,
    parameters: Make,
    device: EmulatedUpdates,
    schedule: str,
    early: bool,
    dtype: torch.dtype,
    micro_batches: int,
    max_norm: float | None,
) -> None:
    params, others = parameters(dtype), parameters(dtype)
    optimizer = adamw(
        params,
        emulated_device=device,
        update_schedule=schedule,
        early_gradients=early,
        max_norm=max_norm,
    )
    found = trained(optimizer, params, micro_batches=micro_batches)
    other = adamw(others, max_norm=max_norm)
    require_same(found, trained(other, others, micro_batches=micro_batches))
    assert optimizer.total_norm == other.total_norm
    optimizer.close()
    assert not device.pinned


@pytest.mark.parametrize("accumulate_dtype", [None, "float32", torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_has_the_same_bits_wherever_it_is_made(
    adamw: Make,
    parameters: Make,
    device: EmulatedUpdates,
    dtype: torch.dtype,
    accumulate_dtype: Any,
) -> None:
    results = []
    for beside in (
        {},
        {"placement": "ssd"},
        *({"emulated_device": device, "update_schedule": schedule} for schedule in SCHEDULES),
        {"emulated_device": device, "placement": "device=0.4,ssd=0.6"},
    ):
        params = parameters(dtype)
        optimizer = adamw(params, early_gradients=True, accumulate_dtype=accumulate_dtype, **beside)
        results.append(trained(optimizer, params, micro_batches=3))
        optimizer.close()
    for found in results[1:]:
        require_same(found, results[0])


def test_fp32_sums_of_bf16_gradients_are_exact(adamw: Make) -> None:
    param = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    optimizer = adamw([param], early_gradients=True, accumulate_dtype="float32")
    for value in (1.0, 2.0**-9, 2.0**-10):  # in bf16 the small ones are lost
        (param * value).sum().backward()
        assert param.grad is None
    optimizer.step()
    exp_avg = states_of(optimizer)[0]["exp_avg"]
    assert exp_avg[0] == torch.tensor(0.1) * torch.tensor(1 + 2.0**-9 + 2.0**-10)


def test_a_gradient_is_given_back_while_the_backward_goes_on(adamw: Make) -> None:
    layers = [torch.nn.Parameter(torch.ones(100)) for _ in range(3)]
    held: list[int] = []
    optimizer = adamw(layers, early_gradients=True)

    def look(param: torch.nn.Parameter) -> None:
        held.append(sum(other.grad is not None for other in layers if other is not param))

    for layer in layers:
        layer.register_post_accumulate_grad_hook(look)
    (layers[0] * layers[1] * layers[2]).sum().backward()
    assert held == [0, 0, 0]
    assert all(layer.grad is None for layer in layers)
    optimizer.step()
    assert all((layer != 1).all() for layer in layers)


def test_what_leaves_is_there_before_the_step_asks(
    adamw: Make, parameters: Make, device: EmulatedUpdates
) -> None:
    params = parameters(torch.bfloat16)
    optimizer = adamw(params, emulated_device=device, update_schedule="host")
    trained(optimizer, params, steps=1)
    backward(params, 5)
    gradients_bytes = 2 * sum(param.numel() for param in params)
    while device.done()["gradients"][0] < 2 * gradients_bytes:
        time.sleep(0.001)  # the first step's, and what this backward has sent
    optimizer.step()
    assert device.done()["gradients"][0] == 2 * gradients_bytes


@pytest.mark.parametrize("change", ["mul_", "data", "sign", "small", "other", "none"])
def test_a_gradient_that_has_changed_is_copied_again(
    adamw: Make, parameters: Make, device: EmulatedUpdates, change: str
) -> None:
    results = []
    for beside in ({}, {"emulated_device": device, "update_schedule": "host"}):
        params = parameters(torch.bfloat16)
        optimizer = adamw(params, **beside)
        for step in range(3):
            backward(params, step)
            for param in params:
                assert param.grad is not None
                if change == "mul_":
                    param.grad.mul_(0.5)
                elif change == "data":
                    param.grad.data.mul_(0.5)
                elif change == "sign":
                    param.grad.data.neg_()  # has the same norm
                elif change == "small":
                    param.grad.data.view(-1)[0] = 2.0**-60  # adds nothing to the norm
                elif change == "other":
                    param.grad = param.grad.clone() * 2
            if change == "none":
                params[step].grad = None
            optimizer.step()
            optimizer.zero_grad()
        results.append(([param.detach().clone() for param in params], states_of(optimizer)))
        optimizer.close()
    require_same(results[1], results[0])


def test_clipping_from_outside_works_where_grad_stays(
    adamw: Make, parameters: Make, device: EmulatedUpdates
) -> None:
    results = []
    for beside in ({}, {"emulated_device": device, "update_schedule": "host"}):
        params = parameters()
        optimizer = adamw(params, **beside)
        for step in range(3):
            backward(params, step)
            torch.nn.utils.clip_grad_norm_(params, 0.3)
            optimizer.step()
            optimizer.zero_grad()
        results.append(([param.detach().clone() for param in params], states_of(optimizer)))
        optimizer.close()
    require_same(results[1], results[0])


@pytest.mark.parametrize("with_device", [False, True])
def test_zero_grad_forgets_what_was_taken(
    adamw: Make, parameters: Make, device: EmulatedUpdates, with_device: bool
) -> None:
    beside = {"emulated_device": device, "update_schedule": "host"} if with_device else {}
    params, others = parameters(), parameters()
    optimizer = adamw(params, early_gradients=True, **beside)
    other = adamw(others)
    trained(optimizer, params, steps=1)
    backward(params, 99)
    optimizer.zero_grad()
    optimizer.step()  # has nothing to do
    found = trained(optimizer, params, steps=2)
    trained(other, others, steps=1)
    require_same(found, trained(other, others, steps=2))


def test_a_gradient_given_by_hand_counts_beside_those_taken(adamw: Make) -> None:
    params, others = ([torch.nn.Parameter(torch.ones(10))] for _ in range(2))
    optimizer, other = adamw(params, early_gradients=True), adamw(others)
    for mine in (params, others):
        (mine[0] * 3).sum().backward()
    params[0].grad = torch.full((10,), 2.0)
    assert others[0].grad is not None
    others[0].grad += 2
    optimizer.step()
    other.step()
    assert torch.equal(params[0], others[0])
    require_equal(states_of(optimizer), states_of(other))


def test_gradients_that_are_not_finite_are_skipped_and_forgotten(
    adamw: Make, parameters: Make, device: EmulatedUpdates
) -> None:
    params, others = parameters(), parameters()
    optimizer = adamw(params, early_gradients=True, emulated_device=device, update_schedule="host")
    other = adamw(others)
    trained(optimizer, params, steps=1)
    trained(other, others, steps=1)
    (params[0] * float("nan")).sum().backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    require_same(trained(optimizer, params, steps=2), trained(other, others, steps=2))


def test_groups_added_later_leave_as_the_new_schedule_says(
    adamw: Make, parameters: Make, device: EmulatedUpdates
) -> None:
    results = []
    for beside in ({}, {"emulated_device": device, "update_schedule": "stride=2"}):
        params, more = parameters(), parameters(seed=1)
        optimizer = adamw(params, early_gradients=True, **beside)
        trained(optimizer, params, steps=2)
        backward(params, 50)  # on the way under the schedule before
        optimizer.add_param_group({"params": more})
        backward(more, 51)
        optimizer.step()
        results.append(trained(optimizer, [*params, *more], micro_batches=2))
        optimizer.close()
    require_same(results[1], results[0])


def test_an_optimizer_that_is_gone_takes_nothing(adamw: Make, parameters: Make) -> None:
    params = parameters()
    optimizer = adamw(params, early_gradients=True)
    optimizer.close()
    backward(params, 0)
    assert all(param.grad is not None for param in params)


def test_hooks_do_not_keep_an_optimizer_alive(parameters: Make) -> None:
    params = parameters()
    gone = weakref.ref(offload.AdamW(params, early_gradients=True))
    gc.collect()
    assert gone() is None
    backward(params, 0)
    assert all(param.grad is not None for param in params)


def test_other_ranks_gradients_are_not_left_out(
    adamw: Make, parameters: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    params = parameters()
    adamw(params, early_gradients=True)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        backward(params, 0)


def test_an_accumulate_dtype_without_early_gradients_is_refused(
    adamw: Make, parameters: Make
) -> None:
    with pytest.raises(ValueError, match="early_gradients=True"):
        adamw(parameters(), accumulate_dtype="float32")
    with pytest.raises(ValueError, match="accumulate_dtype='fp32'"):
        adamw(parameters(), early_gradients=True, accumulate_dtype="fp32")


def test_what_is_unfrozen_later_is_used_up_as_well(adamw: Make) -> None:
    params, others = ([torch.nn.Parameter(torch.ones(10)) for _ in range(2)] for _ in range(2))
    optimizer, other = None, None
    for mine in (params, others):
        mine[1].requires_grad_(False)
    optimizer, other = adamw(params, early_gradients=True), adamw(others)
    for step in range(4):
        if step == 1:
            params[1].requires_grad_()
            others[1].requires_grad_()
        for mine in (params, others):
            (mine[0] * 3 + mine[1] * (step + 1)).sum().backward()
        optimizer.step()
        other.step()
        other.zero_grad()
        assert params[1].grad is None
    assert all(map(torch.equal, params, others))


def test_a_sparse_gradient_can_be_made_dense_before_the_step(
    adamw: Make, device: EmulatedUpdates
) -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = adamw(embedding.parameters(), emulated_device=device, update_schedule="host")
    for _ in range(3):
        embedding(torch.tensor([1, 3])).sum().backward()
        assert embedding.weight.grad is not None
        embedding.weight.grad = embedding.weight.grad.to_dense()
        optimizer.step()
        optimizer.zero_grad()


def test_host_memory_for_gradients_is_bounded(
    adamw: Make, parameters: Make, device: EmulatedUpdates
) -> None:
    others = parameters()
    expected = trained(adamw(others), others, micro_batches=2)
    for most, dtype in ((0, None), (10_000, None), (10_000, "float32"), (None, None)):
        params = parameters()
        optimizer = adamw(
            params,
            early_gradients=True,
            emulated_device=device,
            update_schedule="host",
            gradient_bytes=most,
            accumulate_dtype=dtype,
        )
        require_same(trained(optimizer, params, micro_batches=2), expected)
        buffers = 2 * 4 * optimizer.config.subgroup_params
        needed = sum(-(-4 * param.numel() // 64) * 64 for param in params) + buffers
        taken = optimizer._gradients.memory_bytes()
        assert taken <= (needed if most is None else most)
        assert (taken > 0) is (most != 0)
        assert optimizer.memory_bytes() > taken + 12 * sum(param.numel() for param in params)
        optimizer.close()
