"""SSDTrain's nine cases, against what its authors say of them."""

from __future__ import annotations

import pytest

from perfmodel.layers import CUDA, Shape, tape_of
from perfmodel.machine import read_machine
from perfmodel.published import layer_activation_bytes
from perfmodel.replays.ssdtrain import (
    CASES,
    PUBLISHED_REDUCTION,
    Case,
    Reduction,
    reduction,
)

POINTS = 0.02


@pytest.fixture(scope="module")
def found() -> dict[Case, Reduction]:
    """Each case by the rules of the original."""
    return {case: reduction(case) for case in CASES}


def test_every_reduction_is_in_the_published_range(found: dict[Case, Reduction]) -> None:
    least, most = PUBLISHED_REDUCTION
    for case, each in found.items():
        assert least - POINTS <= each.reduction <= most + POINTS, case


def test_the_best_schedule_saves_at_least_as_much(found: dict[Case, Reduction]) -> None:
    for case in CASES:
        if case.kind == "bert":
            assert reduction(case, best=True).reduction >= found[case].reduction - 0.001


def test_a_faster_drive_saves_more_until_only_the_last_layer_is_left(
    found: dict[Case, Reduction],
) -> None:
    drive = read_machine("ssdtrain").drive
    assert drive is not None
    for case in CASES:
        faster = reduction(case, drive.write_bytes_per_s)
        assert faster.reduction >= found[case].reduction
        assert faster.moved_bytes / faster.kept_peak_bytes < 1 - 0.9 / case.layers


def test_larger_layers_want_less_bandwidth() -> None:
    for kind in ("bert", "gpt", "t5"):
        rates = [
            reduction(case, 1e12).write_bytes_per_s * case.layers / (case.layers - 1)
            for case in CASES
            if case.kind == kind
        ]
        assert rates == sorted(rates, reverse=True)


def test_half_the_maps_save_what_the_published_formula_says() -> None:
    shape = Shape(batch=16, seq_len=1024, element_bytes=2, kernels=CUDA)
    sizes = [tape_of(Case("bert", 8192, layers).model(), shape).saved_bytes() for layers in (1, 2)]
    formula = layer_activation_bytes(1024, 16, 8192, 64, 2, recompute="selective")
    # Norms' statistics, and attention's: the formula leaves them out.
    statistics = 4 * 16 * 1024 * (2 * 2 + 32)
    assert sizes[1] - sizes[0] == formula + statistics
