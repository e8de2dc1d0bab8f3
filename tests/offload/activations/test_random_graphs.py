"""Random graphs of operators, views and in-place changes, against PyTorch without hooks.

The same result to the bit, or the same kind of error. Changes through `.data` are left out: no
counter sees them, so what a backward finds then depends on who still holds the memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import offload
from offload.activations.rates import Rates, Throughput
from offload.device import EmulatedLink

ROWS, COLUMNS = 8, 16


def _without_grad(a: torch.Tensor) -> None:
    with torch.no_grad():
        a.add_(0.5)


COMPUTE = {
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (b.abs() + 1),
    "sin": lambda a, b: a.sin(),
    "exp": lambda a, b: a.clamp(max=2).exp(),
    "sigmoid": lambda a, b: a.sigmoid(),
    "matmul": lambda a, b: a @ b.t() @ b / 16,
    "softmax": lambda a, b: a.softmax(-1),
    "layer norm": lambda a, b: torch.layer_norm(a, a.shape[-1:]),
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "detached": lambda a, b: a.detach() * b,
    "complex": lambda a, b: (torch.complex(a, b).conj() * torch.complex(b, a)).real,
    "bf16": lambda a, b: (a.bfloat16() * b.bfloat16()).float(),
    "cat": lambda a, b: torch.cat([a, b])[::2] * 2,
}
VIEW = {
    "transpose": lambda a: a.t().reshape(ROWS, COLUMNS),
    "flip halves": lambda a: a.view(2, -1, COLUMNS).transpose(0, 1).reshape(ROWS, COLUMNS),
    "expand": lambda a: a[:1].expand(ROWS, COLUMNS),
    "slice": lambda a: a[1:2, ::2].repeat(ROWS, 2),
    "chunk": lambda a: torch.cat(a.chunk(4, dim=1)[::-1], 1),
    "alias": lambda a: a.view(ROWS, COLUMNS),
    "reversed strides": lambda a: a.view(COLUMNS, ROWS).t(),
    "detach": lambda a: a.detach(),
}
CHANGE = {
    "mul_": lambda a: a.mul_(1.5),
    "row": lambda a: a[2].zero_(),
    "view": lambda a: a.view(-1)[3:40].add_(1),
    "relu_": lambda a: a.relu_(),
    "detached": lambda a: a.detach().mul_(1.25),
    "no grad": _without_grad,
}


index = st.integers(0, 1000)
STEP = st.one_of(
    st.tuples(st.just("compute"), st.sampled_from(sorted(COMPUTE)), index, index),
    st.tuples(st.just("compute"), st.sampled_from(sorted(COMPUTE)), index, index),
    st.tuples(st.just("view"), st.sampled_from(sorted(VIEW)), index, index),
    st.tuples(st.just("change"), st.sampled_from(sorted(CHANGE)), index, index),
    st.tuples(st.just("forget"), st.just(""), index, index),
    st.tuples(st.just("split"), st.just(""), index, index),
)
PROGRAM = st.lists(STEP, min_size=2, max_size=25)


def take(step: tuple[str, str, int, int], values: list[torch.Tensor]) -> None:
    kind, name, first, second = step
    a, b = values[first % len(values)], values[second % len(values)]
    if kind == "compute":
        values.append(COMPUTE[name](a, b))
    elif kind == "view":
        values.append(VIEW[name](a))
    elif kind == "change":
        CHANGE[name](a)
    elif kind == "forget" and len(values) > 3:
        values.pop(2 + first % (len(values) - 2))


def execute(
    act: offload.ActivationOffload | None, program: Any, backwards: int, drained: bool, late: Any
) -> Any:
    torch.manual_seed(1)
    leaf = torch.randn(ROWS, COLUMNS, requires_grad=True)
    other = torch.randn(ROWS, COLUMNS, requires_grad=True)
    values = [leaf, other, leaf * 1]
    done = 0
    try:
        while done < len(program):
            with act.forward() if act else torch.enable_grad():
                for done in range(done, len(program)):  # noqa: B020
                    if program[done][0] == "split":
                        break
                    take(program[done], values)
                done += 1
        if act is not None and drained:
            act.transfers.drain()
        loss = sum(value.sum() for value in values)
        if late is not None:
            CHANGE[late](values[-1])
        del values
        for turn in range(backwards):
            loss.backward(retain_graph=turn < backwards - 1)
    except RuntimeError as error:
        message = str(error)
        known = ("modified by an inplace operation", "a leaf Variable", "second time", "is a view")
        return next((words for words in known if words in message), message)
    return [
        None if g is None else g.contiguous().view(torch.int32).tolist()
        for g in (leaf.grad, other.grad)
    ]


@pytest.fixture(scope="module")
def acts() -> Iterator[list[offload.ActivationOffload]]:
    parent = Path(__file__).resolve().parents[3] / "build" / "test-spill"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        opened = [
            offload.ActivationOffload(
                path=folder,
                min_tensor_bytes=0,
                spill_bytes=spill,
                staging_bytes=staging,
                block_bytes=4096,
            )
            for spill, staging in (
                (16 << 20, 1 << 20),
                (16 << 20, 8192),
                (3 * 4096, 1 << 16),
                (16 << 20, 1 << 20),
            )
        ]
        # The last of these makes schedules: as if it had seen a drive on which not everything fits.
        opened[-1].book.rates["ssd"] = Rates(Throughput(2e7, 2e7))
        # Two whose tensors lie on a device: one with both tiers, one with little host memory.
        opened += [
            offload.ActivationOffload(
                min_tensor_bytes=0,
                staging_bytes=1 << 18,
                block_bytes=4096,
                device_window_bytes=2048,
                emulated_device=EmulatedLink(latency_s=latency_s),
                **where,
            )
            for latency_s, where in (
                (0.0, {"path": folder, "spill_bytes": 1 << 20, "host_bytes": 1 << 16}),
                (0.0002, {"tier": "host", "host_bytes": 1 << 16}),
            )
        ]
        yield opened
        for act in opened:
            act.transfers.drain()
            assert act.stats().spill_bytes == 0
            assert act.counters.kept_now == 0
            assert act.transfers.ahead_bytes == 0
            act.close()


@seed(20250301)
@settings(max_examples=300, derandomize=False, database=None)
@given(
    program=PROGRAM,
    backwards=st.integers(1, 3),
    drained=st.booleans(),
    which=st.integers(0, 5),
    late=st.one_of(st.none(), st.none(), st.sampled_from(sorted(CHANGE))),
)
def test_a_random_program_ends_as_it_does_without_hooks(
    acts: Any, program: Any, backwards: int, drained: bool, which: int, late: Any
) -> None:
    expected = execute(None, program, backwards, drained, late)
    for _ in range(3 if which >= 3 else 1):  # by a schedule from the second time on
        assert execute(acts[which], program, backwards, drained, late) == expected
