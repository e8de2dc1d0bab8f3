"""Updates on a device, on the host and there and back: the same bits, whatever the schedule."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload.device.emulated_updates import EmulatedRates, EmulatedUpdates
from offload.native import AdamSettings, ThreadPool
from offload.optimizer.interleaved import Interleaved, Job
from offload.optimizer.interruption import Uninterrupted
from offload.optimizer.layout import Piece, lay_out
from offload.optimizer.states import HostStates
from perfmodel.schedules.updates import UpdateSchedule, share_schedule, stride_schedule

Make = Callable[..., Any]
SETTINGS = AdamSettings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
STEPS = 4


@pytest.fixture
def open_device() -> Iterator[Callable[..., EmulatedUpdates]]:
    """Open emulated devices; all memory that they pinned must have been given back."""
    opened: list[EmulatedUpdates] = []

    def make(**rates: Any) -> EmulatedUpdates:
        opened.append(EmulatedUpdates(EmulatedRates(**rates)))
        return opened[-1]

    yield make
    for device in opened:
        device.close()
        assert not device.pinned


def trained(
    device: EmulatedUpdates,
    params: list[torch.nn.Parameter],
    give_grads: Make,
    schedule_of: Callable[[list[int]], UpdateSchedule],
    size: int = 1000,
) -> list[torch.Tensor]:
    """Return parameters and states after some steps."""
    subgroups = lay_out(0, params, size, all_masters=True)
    schedule = schedule_of([subgroup.count for subgroup in subgroups])
    rows = [HostStates(subgroup) for subgroup in subgroups]
    for subgroup, states in zip(subgroups, rows, strict=True):
        for piece in subgroup.pieces:
            piece.inside(states.begin()[2]).copy_(piece.of(piece.param.detach()))
    engine = Interleaved(device, ThreadPool(2), size, buffers=schedule.buffers, slots=2)

    def grad_of(piece: Piece) -> torch.Tensor:
        assert piece.param.grad is not None
        return piece.of(piece.param.grad)

    for step in range(STEPS):
        give_grads(params, step)
        number = dict.fromkeys(params, step + 1)
        jobs = [
            Job(place, states, subgroup.pieces, SETTINGS, number, grad_of)
            for subgroup, place, states in zip(subgroups, schedule.places, rows, strict=True)
        ]
        progress = SimpleNamespace(done=set(), pieces=set())
        engine.run(dict(enumerate(jobs)), 0.5, progress, Uninterrupted())
        assert progress.done == set(range(len(jobs)))
    engine.close()
    return [*(param.detach() for param in params), *(states.read() for states in rows)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.59, 1.0])
def test_a_share_on_the_device_changes_no_bit(
    open_device: Make, parameters: Make, give_grads: Make, dtype: torch.dtype, share: float
) -> None:
    def schedule_of(sizes: list[int]) -> UpdateSchedule:
        return share_schedule(sizes, share, resident=0.2)

    expected = trained(
        open_device(), parameters(dtype), give_grads, lambda sizes: stride_schedule(sizes, 0)
    )
    found = trained(open_device(), parameters(dtype), give_grads, schedule_of, 1000)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("seed", range(8))
def test_any_places_sizes_and_delays_give_the_same_bits(
    open_device: Make, parameters: Make, give_grads: Make, seed: int
) -> None:
    chance = random.Random(seed)
    size = chance.choice([77, 500, 5000])

    def schedule_of(sizes: list[int]) -> UpdateSchedule:
        places = [chance.choice(["resident", "moved", "host"]) for _ in sizes]
        return UpdateSchedule(tuple(sizes), tuple(places), chance.randint(1, 3))

    device = open_device(
        device_params_per_s=chance.choice([1e6, 1e8]),
        host_params_per_s=chance.choice([1e6, 1e8]),
        to_device_bytes_per_s=chance.choice([2e7, 1e9]),
        to_host_bytes_per_s=chance.choice([2e7, 1e9]),
        jitter=0.5,
        seed=seed,
    )
    dtype = chance.choice([torch.bfloat16, torch.float32])
    found = trained(device, parameters(dtype), give_grads, schedule_of, size)
    host = trained(
        open_device(),
        parameters(dtype),
        give_grads,
        lambda sizes: UpdateSchedule(tuple(sizes), ("host",) * len(sizes)),
        size,
    )
    assert all(map(torch.equal, found, host))
    done = device.done()
    assert sum(done[name][0] for name in ("device", "host")) == STEPS * sum(
        param.numel() for param in parameters()
    )
