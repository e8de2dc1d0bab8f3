"""Numbers and tables as they are printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.commands.tables import ascii_line, bar, days, digits, table


def test_columns_stand_below_each_other() -> None:
    lines = table(("name", "n"), [["a", "1"], ["longer", "100"]])
    assert lines == ["name      n", "a         1", "longer  100"]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0.00"), (0.00312, "0.00312"), (1, "1.00"), (12.34, "12.3"), (1234.5, "1,234")],
)
def test_three_digits_count(value: float, said: str) -> None:
    assert digits(value) == said


@given(st.floats(1e-30, 1e30))
def test_what_is_printed_is_near_what_it_stands_for(value: float) -> None:
    assert float(digits(value).replace(",", "")) == pytest.approx(value, rel=0.006)


def test_a_life_is_in_days_or_years() -> None:
    assert days(None) == "-"
    assert days(12) == "12 days"
    assert days(10 * 365.25) == "10 years"


@given(st.floats(0, 1e6))
def test_a_bar_is_always_as_wide_and_shows_what_is_over(part: float) -> None:
    drawn = bar(part, 10)
    assert len(drawn) == 12
    assert drawn.endswith(">") == (part > 1)


def test_half_a_bar_is_half_full() -> None:
    assert bar(0.5, 10) == "[#####     ]"


@given(st.text())
def test_a_line_is_one_of_ascii(text: str) -> None:
    line = ascii_line(text)
    assert line.isascii()
    assert len(line.splitlines()) <= 1
