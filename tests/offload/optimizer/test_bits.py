"""One and the same parameters and moments, whatever updates them and wherever they are."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import offload
from offload.device import emulated_updates, updates
from offload.device.emulated_updates import EmulatedRates, EmulatedUpdates
from offload.native import ThreadPool, adam_update, plain_sum, squared_norm
from offload.optimizer import gradients, host_side
from tests.offload.optimizer.test_adamw import states_of

Make = Callable[..., Any]
SETTINGS = {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
SMALL = ((7, 11, 13), (1,), (83, 101), (3, 3333), (616,))  # 20,000 parameters
LARGE = ((1999, 2001), (1_000_000,), (1,))  # 5 million
VERSIONS = ("scalar", "avx2", "avx512")
PLACES = ("host", "ssd", "share=0", "share=0.3", "share=0.59", "share=1")
ACCUMULATIONS = (1, 3)
CLIPS = (None, 0.5)
Case = tuple[str, str, int, float | None, int]


def here(version: str) -> bool:
    """Say whether this processor has a version."""
    try:
        squared_norm(ThreadPool(1), torch.ones(1), version)
    except ValueError:
        return False
    return True


def pairs_of(case: tuple[Any, ...]) -> set[tuple[Any, ...]]:
    numbered = enumerate(case)
    return set(itertools.combinations(numbered, 2))


def covering(*choices: tuple[Any, ...]) -> list[Case]:
    """Return cases in which each two values of two choices meet at least once."""
    chance = random.Random(0)
    everything = list(itertools.product(*choices))
    left = set().union(*map(pairs_of, everything))
    cases = []
    while left:
        chance.shuffle(everything)
        best = max(everything, key=lambda case: len(left & pairs_of(case)))
        left -= pairs_of(best)
        cases.append(best)
    return cases


@pytest.fixture
def train(spill_dir: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[torch.Tensor]]:
    """Train parameters of these shapes; returns them and their states."""

    def make(shapes: Any, dtype: torch.dtype, steps: int, case: Case) -> list[torch.Tensor]:
        version, place, accumulation, max_norm, subgroup_params = case
        update = functools.partial(adam_update, version=version)
        for module in (host_side, updates, emulated_updates):
            monkeypatch.setattr(module, "adam_update", update)
        for total in (squared_norm, plain_sum):
            for user in (gradients, emulated_updates):
                chosen = functools.partial(total, version=version)
                monkeypatch.setattr(user, total.__name__, chosen)
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape in shapes
        ]
        device = EmulatedUpdates(EmulatedRates()) if place.startswith("share") else None
        on_ssd = {"path": spill_dir, "staging_bytes": 1 << 26} if place == "ssd" else {}
        beside = {"emulated_device": device, "update_schedule": place} if device else {}
        optimizer = offload.AdamW(
            params,
            **SETTINGS,
            max_norm=max_norm,
            subgroup_params=subgroup_params,
            threads=2,
            **on_ssd,
            **beside,
        )
        for step in range(steps):
            for number in range(accumulation):
                give(params, step * accumulation + number)
            optimizer.step()
            optimizer.zero_grad()
        found = [param.detach() for param in params]
        for states in states_of(optimizer).values():
            found += [states[name] for name in sorted(states)]
        optimizer.close()
        if device is not None:
            device.close()
        return found

    return make


def give(params: list[torch.nn.Parameter], number: int) -> None:
    """Add gradients as autograd does, the same ones for the same number."""
    generator = torch.Generator().manual_seed(100 + number)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad += grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_two_of_version_place_accumulation_clipping_and_size_change_no_bit(
    train: Make, dtype: torch.dtype
) -> None:
    versions = tuple(filter(here, VERSIONS))
    for accumulation, clip in itertools.product(ACCUMULATIONS, CLIPS):
        cases = [
            case
            for case in covering(versions, PLACES, ACCUMULATIONS, CLIPS, (97, 1000))
            if case[2:4] == (accumulation, clip)
        ]
        expected = train(SMALL, dtype, 4, ("scalar", "host", accumulation, clip, 1 << 20))
        for case in cases:
            assert all(map(torch.equal, train(SMALL, dtype, 4, case), expected)), case


@pytest.mark.parametrize("place", ["host", "share=0.59"])
def test_subgroups_of_one_parameter_change_no_bit(train: Make, place: str) -> None:
    shapes = SMALL[:2]
    expected = train(shapes, torch.bfloat16, 3, ("scalar", "host", 1, 0.5, 1000))
    found = train(shapes, torch.bfloat16, 3, ("scalar", place, 1, 0.5, 1))
    assert all(map(torch.equal, found, expected))


def soaked(shapes: Any, sizes: tuple[int, ...]) -> Iterator[Any]:
    """Return all cases; where a step has thousands of subgroups, fewer steps."""
    for case in itertools.product(VERSIONS, PLACES, ACCUMULATIONS, CLIPS, sizes):
        steps = 10 if case[-1] == 1 else 200
        yield pytest.param(shapes, steps, case, id="-".join(map(str, case)))


@pytest.fixture(scope="module")
def expected_of() -> dict[Any, list[torch.Tensor]]:
    """Hold what the scalar version does on the host, so that it is done once."""
    return {}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("shapes", "steps", "case"),
    [*soaked(SMALL, (1, 1000)), *soaked(LARGE, (100_003, 1_000_000))],
)
def test_the_full_product_has_the_same_bits(
    train: Make, expected_of: dict[Any, Any], shapes: Any, steps: int, case: Case
) -> None:
    version, _, accumulation, clip, _ = case
    if not here(version):
        pytest.skip(f"this processor has no {version}")
    key = (len(shapes), steps, accumulation, clip)
    if key not in expected_of:
        plain = ("scalar", "host", accumulation, clip, 1 << 23)
        expected_of[key] = train(shapes, torch.bfloat16, steps, plain)
    assert all(map(torch.equal, train(shapes, torch.bfloat16, steps, case), expected_of[key]))
