"""One forward beside the other things that a forward may be in: checkpoints, hooks, exceptions."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

SIZE = 64
NBYTES = SIZE * SIZE * 4


def square() -> torch.Tensor:
    return torch.randn(SIZE, SIZE)


def leaves(count: int) -> list[torch.Tensor]:
    return [torch.randn(SIZE, SIZE, requires_grad=True) for _ in range(count)]


def chain(run: Any, weights: list[torch.Tensor]) -> torch.Tensor:
    with run.forward():
        y = torch.ones(SIZE, SIZE)
        for weight in weights:
            y = (y * weight).sin()
        return y.sum()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_inside_offloads_only_its_inputs(
    make: Any, same_bits: Any, reentrant: bool
) -> None:
    act = make()

    def block(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x.cos()).exp().sigmoid()

    def compute(run: Any) -> list[torch.Tensor]:
        w = torch.randn(SIZE, SIZE, requires_grad=True)
        with run.forward():
            y = checkpoint(block, w + 1, use_reentrant=reentrant)
            y = checkpoint(block, y, use_reentrant=reentrant)
        run.written()
        y.sum().backward()
        return [w.grad]

    same_bits(act, compute)
    assert act.stats().offloaded_bytes == 2 * NBYTES


def test_inside_a_recomputing_checkpoint_it_refuses(make: Any) -> None:
    act = make()

    def block(x: torch.Tensor) -> torch.Tensor:
        with act.forward():
            return x.sin()

    with pytest.raises(RuntimeError, match=r"inside torch.utils.checkpoint.*around"):
        checkpoint(block, torch.ones(4, requires_grad=True), use_reentrant=False)
    with act.forward():  # and leaves nothing switched on
        pass


def test_inside_a_reentrant_checkpoint_the_bits_are_the_same(make: Any, same_bits: Any) -> None:
    def compute(run: Any) -> list[torch.Tensor]:
        def block(x: torch.Tensor) -> torch.Tensor:
            with run.forward():
                return x.sin().exp()

        w = torch.randn(SIZE, SIZE, requires_grad=True)
        checkpoint(block, w * 2, use_reentrant=True).sum().backward()
        return [w.grad]

    same_bits(make(), compute)


def test_other_hooks_inside_take_what_is_saved_there(make: Any, same_bits: Any) -> None:
    act = make()
    packed: list[int] = []

    def compute(run: Any) -> list[torch.Tensor]:
        w = torch.randn(SIZE, SIZE, requires_grad=True)
        with run.forward():
            y = (w * square()).sin()
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda t: packed.append(t.nbytes) or t, lambda t: t
            )
            with hooks if run.act else contextlib.nullcontext():
                y = y.exp()
            y = y.cos()
        y.sum().backward()
        return [w.grad]

    same_bits(act, compute)
    assert packed == [NBYTES]


def test_an_exception_in_the_forward_leaves_nothing_behind(make: Any, same_bits: Any) -> None:
    act = make()

    def forward_that_fails() -> None:
        with act.forward():
            y = chain(_Plain(), leaves(4))
            raise KeyError(str(y.shape))

    for _ in range(3):
        with pytest.raises(KeyError):
            forward_that_fails()
    act.transfers.drain()
    assert act.stats().spill_bytes == 0
    assert act.forwards == set()

    def compute(run: Any) -> list[torch.Tensor]:
        weights = leaves(4)
        chain(run, weights).backward()
        return [weight.grad for weight in weights]

    same_bits(act, compute)


class _Plain:
    forward = staticmethod(contextlib.nullcontext)


def test_a_graph_saved_before_an_exception_still_runs_backward(make: Any) -> None:
    act = make()
    w = torch.ones(SIZE, SIZE, requires_grad=True)
    with contextlib.suppress(KeyError), act.forward():
        y = (w * 2).sin().sin()
        raise KeyError
    y.sum().backward()
    assert w.grad is not None


def test_a_forward_is_entered_once(make: Any) -> None:
    act = make()
    step = act.forward()
    with step:
        pass
    with pytest.raises(RuntimeError, match=r"act\.forward\(\) again"):
        step.__enter__()


def test_one_module_hook_stays_for_an_instances_whole_life_and_no_longer(make: Any) -> None:
    from torch.nn.modules import module

    before = dict(module._global_forward_pre_hooks)
    act = make()
    during = dict(module._global_forward_pre_hooks)
    assert len(during) == len(before) + 1
    with act.forward():
        assert dict(module._global_forward_pre_hooks) == during
    assert dict(module._global_forward_pre_hooks) == during
    act.close()
    assert dict(module._global_forward_pre_hooks) == before


def test_hooks_are_gone_after_the_forward(make: Any) -> None:
    act = make()
    with act.forward():
        pass
    (torch.ones(4, requires_grad=True) * torch.ones(4)).sum().backward()
    assert act.stats().offloaded_bytes == 0
