"""Tests of `perfmodel.endurance`: no day has more writes than allowed, and none is lost."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.endurance import DAY_S, WriteBudget, life_days


@given(st.integers(0, 2**32), st.integers(1, 10**15))
def test_no_24_hours_have_more_than_a_days_bytes(seed: int, per_day: int) -> None:
    rng = random.Random(seed)
    budget = WriteBudget(per_day, now_s=0.0)
    now_s, written = 0.0, []
    for _ in range(300):
        now_s += rng.choice([0.0, rng.uniform(0, 600), rng.uniform(0, 2 * DAY_S)])
        nbytes = rng.randint(0, max(1, per_day // rng.choice([10, 100, 1000])))
        if budget.allow(nbytes, now_s):
            written.append((now_s, nbytes))
    for begin_s, _ in written:
        within = sum(nbytes for time_s, nbytes in written if 0 <= time_s - begin_s < DAY_S)
        assert within <= per_day * (1 + 1e-9)


def test_who_asks_for_little_gets_nearly_all_of_it() -> None:
    budget = WriteBudget(2400, now_s=0.0)
    written = sum(budget.allow(1, now_s) for now_s in map(float, range(int(DAY_S))))
    assert 2398 <= written <= 2400


def test_an_hours_worth_goes_at_once_and_then_comes_back_with_time() -> None:
    budget = WriteBudget(2400, now_s=5.0)
    assert budget.allow(100, 5.0)
    assert not budget.allow(1, 5.0)
    assert not budget.allow(1, 4.0), "a clock that goes back gives nothing"
    assert budget.allow(1, 5.0 + 1.01 / budget.bytes_per_s)
    assert budget.allow(100, 5.0 + DAY_S)
    assert not budget.allow(1, 5.0 + DAY_S), "what was not used does not pile up"


@pytest.mark.parametrize("per_day", [0, -1, math.inf, math.nan])
def test_a_budget_that_is_none_is_refused(per_day: float) -> None:
    with pytest.raises(ValueError, match="bytes_per_day"):
        WriteBudget(per_day, now_s=0.0)


def test_life_is_the_rating_over_what_is_written() -> None:
    assert life_days(2e12, 600e12) == 300
    assert life_days(2e12, 600e12, write_amplification=2.5, rated_amplification=2.5) == 300
    assert life_days(2e12, 600e12, rated_amplification=2.5) == 750
    assert life_days(0, 600e12) == math.inf


@pytest.mark.parametrize(
    "wrong",
    [
        {"bytes_per_day": -1.0},
        {"rated_bytes": 0.0},
        {"write_amplification": 0.0},
        {"rated_amplification": math.nan},
    ],
)
def test_impossible_drives_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        life_days(**{"bytes_per_day": 1.0, "rated_bytes": 1.0} | wrong)
