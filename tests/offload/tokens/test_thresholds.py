"""Thresholds begin at the mean of what was seen, and climb to what is better."""

from __future__ import annotations

import math

import pytest

from offload.tokens.thresholds import first_thresholds, tune_thresholds


def test_they_begin_at_each_layers_mean() -> None:
    assert first_thresholds([[1.0, 3.0], [4.0]]) == (2.0, 4.0)


def test_each_climbs_to_where_accuracy_is_best() -> None:
    best = (1.3, 0.4)

    def accuracy(thresholds: tuple[float, ...]) -> float:
        return -sum((one - other) ** 2 for one, other in zip(thresholds, best, strict=True))

    found = tune_thresholds((1.0, 1.0), accuracy, rounds=30, rate=0.2, gain=1.0)
    assert found == pytest.approx(best, abs=1e-3)


def test_a_layer_without_scores_and_a_flat_accuracy_stay_where_they_are() -> None:
    asked = []

    def accuracy(thresholds: tuple[float, ...]) -> float:
        asked.append(thresholds)
        return 1.0

    assert tune_thresholds((0.0, 2.0), accuracy) == (0.0, 2.0)
    assert all(each[0] == 0.0 for each in asked)
    assert len(asked) == 2


def test_no_threshold_moves_far_at_once_or_below_nothing() -> None:
    found = tune_thresholds((1.0,), lambda each: -1e9 * each[0], rounds=1)
    assert found == pytest.approx((0.9,))
    assert tune_thresholds((1.0,), lambda each: -1e9 * each[0], rounds=99) == (0.0,)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_accuracy_that_is_no_number_moves_nothing_and_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"accuracy is {value} with thresholds=\[1\.1, 2\.0\]"):
        tune_thresholds((1.0, 2.0), lambda _: value)


@pytest.mark.parametrize("gain", [0.0, -1.0, math.nan, math.inf])
def test_a_gain_that_nothing_is_worth_is_refused(gain: float) -> None:
    with pytest.raises(ValueError, match=f"gain={gain} is not a number over 0"):
        tune_thresholds((1.0,), lambda _: 1.0, gain=gain)
