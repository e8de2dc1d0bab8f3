"""Several queues of a device: whoever uses bytes waits for their copy, and says where it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import offload
from offload.device import EmulatedLink, Moment

Open = Callable[..., offload.ActivationOffload]
MIB = 1 << 20


class Queues(EmulatedLink):
    """Two queues between which a thread may change; `main_queue` is 0."""

    def __init__(self) -> None:
        super().__init__(latency_s=0.02)  # longer than the host takes to queue all
        self.here = 0
        self.held: list[int] = []
        self.used: list[int] = []
        self.left: list[int] = []

    def queue(self) -> int:
        return self.here

    def hold(self, moment: Moment, queue: Any) -> None:
        self.held.append(queue)
        super().hold(moment, queue)

    def used_on(self, tensor: torch.Tensor, queue: Any) -> None:
        self.used.append(queue)

    def leaves(self, tensor: torch.Tensor) -> None:
        self.left.append(tensor.untyped_storage().nbytes())


class On(torch.autograd.Function):
    """Saves a tensor, and asks for it on a queue of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, link: Queues, queue: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.link, ctx.queue = link, queue
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.link.here = ctx.queue
        (x,) = ctx.saved_tensors
        ctx.link.here = 0
        return grad * x, None, None


def device(make: Open, link: Queues, **settings: Any) -> offload.ActivationOffload:
    chosen: dict[str, Any] = {"tier": "host", "path": (), "host_bytes": 16 * MIB} | settings
    return make(**chosen, emulated_device=link)


def test_each_queue_that_uses_a_restored_tensor_waits_for_its_copy(make: Open) -> None:
    link = Queues()
    act = device(make, link)
    start = torch.randn(MIB // 8, requires_grad=True)
    with act.forward():
        x = start * 2.0
        out = On.apply(x, link, 1) + On.apply(x, link, 0) + On.apply(x, link, 1)  # type: ignore[no-untyped-call]
        del x
        out = out * 1.0
    act.transfers.drain()
    link.held.clear()
    out.sum().backward()
    assert sorted(link.held) == [0, 1], "each of them, and only once"
    # Taken on whichever asked first; the other one says that it uses it.
    assert len(link.used) == 1
    assert torch.equal(start.grad, 3 * 4.0 * start.detach()), "three times 2 x · 2"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("queue", "given", "told"),
    [(0, False, False), (0, True, True), (1, False, True)],
    ids=["made on the main queue", "made by somebody else", "made on another queue"],
)
def test_memory_that_another_queue_may_have_back_is_told_of_its_copy(
    make: Open, queue: int, given: bool, told: bool
) -> None:
    link = Queues()
    act = device(make, link, device_window_bytes=0)  # each waits for the one before
    link.here = queue
    weight = torch.ones((), requires_grad=True)
    with act.forward():
        x = torch.ones(MIB // 4)
        x = x * weight if given else weight.expand(MIB // 4) + x  # the first one saves x
        for _ in range(3):
            x = x.exp().log()
        loss = x.sum()
    loss.backward()
    assert act.stats().offloaded_bytes >= 3 * MIB
    assert bool(link.left) is told


def test_waiting_for_copies_is_stalling(make: Open) -> None:
    waited = []
    for latency_s in (0.0, 0.01):
        link = EmulatedLink(latency_s=latency_s)
        act = make(
            tier="host",
            path=(),
            host_bytes=16 * MIB,
            device_window_bytes=0,
            emulated_device=link,
        )
        x = torch.ones(MIB // 8, requires_grad=True)
        with act.forward():
            y = x
            for _ in range(8):
                y = y.exp().log()
        y.sum().backward()
        waited.append(act.stats().stall_s)
    # A sleep takes at least its time: at least seven copies, each for the one before.
    assert waited[1] > 7 * 0.01 > 0
    assert waited[1] > waited[0]


@pytest.mark.parametrize("bound", [None, 3 * MIB])
def test_the_window_grows_to_what_a_schedule_has_planned_with(
    make: Open, bound: int | None
) -> None:
    act = device(make, Queues(), device_window_bytes=bound)
    (crossing,) = act.transfers.crossings.values()
    crossing.allow(1 << 30)
    assert crossing._window_bytes == (bound or 1 << 30)
