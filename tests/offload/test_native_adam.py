"""The update and the norm on tensors: PyTorch's bits, in place, refused where they cannot work."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.native import AdamSettings, ThreadPool, adam_path, adam_update, plain_sum, squared_norm

# What torch does at the end of an array is not vectorized, and rounds elsewhere.
WHOLE_VECTORS = 4 * 16 * 64


@pytest.fixture(scope="module")
def pool() -> ThreadPool:
    return ThreadPool(2)


def state_of(count: int) -> dict[str, torch.Tensor]:
    return {
        "master_param": torch.randn(count),
        "exp_avg": torch.zeros(count),
        "exp_avg_sq": torch.zeros(count),
    }


def named(lr: float, betas: tuple[float, float], eps: float, decay: float) -> AdamSettings:
    return AdamSettings(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=decay)


@pytest.mark.usefixtures("one_thread")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**16),
    lr=st.sampled_from([1e-4, 3e-4, 1e-3, 0.1]),
    betas=st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.3, 0.99), (0.5, 0.5), (0.0, 0.999)]),
    eps=st.sampled_from([1e-8, 1e-6]),
    decay=st.sampled_from([0.0, 0.01, 0.1, 0.3]),
    size=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
)
def test_float32_gives_the_bits_of_torchs_fused_adamw(
    pool: ThreadPool,
    seed: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    size: float,
) -> None:
    torch.manual_seed(seed)
    ours = state_of(WHOLE_VECTORS)
    theirs = ours["master_param"].clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [theirs], lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True
    )
    for step in range(1, 6):
        grad = torch.randn(WHOLE_VECTORS) * size
        theirs.grad = grad.clone()
        optimizer.step()
        adam_update(pool, named(lr, betas, eps, decay), step, grad=grad, **ours)
        assert torch.equal(ours["master_param"], theirs.detach())
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours[name], optimizer.state[theirs][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_takes_and_leaves_what_torch_casts(
    pool: ThreadPool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    one = state_of(100_003)
    other = {name: each.clone() for name, each in one.items()}
    low = torch.zeros(100_003, dtype=dtype)
    chosen = named(1e-3, (0.9, 0.99), 1e-8, 0.1)
    for step in range(1, 4):
        grad = torch.randn(100_003).to(dtype)
        adam_update(pool, chosen, step, grad=grad, param=low, **one)
        adam_update(pool, chosen, step, grad=grad.float(), **other)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert torch.equal(low, other["master_param"].to(dtype))


def test_scaling_clipping_and_maximizing_are_those_of_the_gradient(pool: ThreadPool) -> None:
    grad = torch.randn(1000)
    one = state_of(1000)
    other = {name: each.clone() for name, each in one.items()}
    up = AdamSettings(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, maximize=True)
    adam_update(pool, up, 1, grad=grad * 1024, grad_scale=512.0, clip=0.25, **one)
    adam_update(pool, named(0.1, (0.9, 0.99), 1e-8, 0.0), 1, grad=-grad / 2, **other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_norm_is_that_of_double_precision(pool: ThreadPool) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.randn(123_457).to(dtype)
        exact = values.double().square().sum().item()
        assert math.isclose(squared_norm(pool, values), exact, rel_tol=1e-12)
        assert squared_norm(ThreadPool(1), values) == squared_norm(pool, values)
        assert plain_sum(ThreadPool(1), values) == plain_sum(pool, values)
        assert plain_sum(pool, -values) == -plain_sum(pool, values)
        total = float(values.double().sum())
        assert math.isclose(plain_sum(pool, values), total, rel_tol=1e-9, abs_tol=1e-9)
        values[77_777] = math.nan
        assert math.isnan(squared_norm(pool, values))
    assert squared_norm(pool, torch.empty(0)) == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"exp_avg": torch.zeros(10).half()}, "exp_avg is float16; it can be float32"),
        ({"grad": torch.zeros(10).double()}, "grad is float64; it can be float32, bfloat16, float"),
        ({"grad": torch.zeros(9)}, "elements, but grad 9"),
        ({"param": torch.zeros(11)}, "param has 11 elements, but grad 10"),
        ({"master_param": torch.zeros(20)[::2]}, r"strides \(2,\); it has to lie on the host"),
        ({"grad": torch.zeros(10, device="meta")}, "grad is on meta"),
        ({"step": 0}, "step counts from 1"),
    ],
)
def test_what_cannot_be_updated_is_refused_by_name(
    pool: ThreadPool, change: dict[str, Any], complaint: str
) -> None:
    state: dict[str, Any] = {**state_of(10), "grad": torch.ones(10)}
    before = {name: each.clone() for name, each in state.items()}
    chosen = named(1e-3, (0.9, 0.99), 1e-8, 0.1)
    arguments: dict[str, Any] = {"step": 1, **state, **change}
    with pytest.raises(ValueError, match=complaint):
        adam_update(pool, chosen, **arguments)
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_the_path_is_told() -> None:
    assert adam_path() in {"avx512", "avx2", "scalar"}
    assert ThreadPool(3, [0]).num_threads == 3
    with pytest.raises(OSError, match="CPUs 1023"):
        ThreadPool(1, [1023])


def test_a_backward_hears_that_what_it_saved_was_updated(pool: ThreadPool) -> None:
    weight = torch.ones(10, requires_grad=True)
    loss = (weight * weight).sum()
    state = state_of(10) | {"master_param": weight.detach()}
    adam_update(pool, named(0.1, (0.9, 0.99), 1e-8, 0.0), 1, grad=torch.ones(10), **state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_view_that_negates_is_refused(pool: ThreadPool) -> None:
    with pytest.raises(ValueError, match="grad is a view that negates"):
        adam_update(
            pool,
            named(0.1, (0.9, 0.99), 1e-8, 0.0),
            1,
            grad=torch._neg_view(torch.ones(10)),
            **state_of(10),
        )
