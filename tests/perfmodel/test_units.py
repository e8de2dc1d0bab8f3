"""Sizes: read as written, and refused where a unit could mean another thing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("64MiB", 64 << 20),
        ("1.5 GiB", 3 << 29),
        ("2gib", 2 << 30),
        ("600TB", 600 * 10**12),
        ("8kB", 8000),
    ],
)
def test_a_size_is_read_as_it_is_written(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "4Gb", "-1", "1e9", "4GiB5", "four", "1GIBB", "nan"])
def test_what_is_no_size_is_refused_with_its_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"device_memory=.* is not a size"):
        parse_bytes(text, "device_memory")


@given(st.integers(0, 1 << 59))
def test_a_size_comes_back_nearly_as_it_was(nbytes: int) -> None:
    again = parse_bytes(format_bytes(nbytes))
    assert abs(again - nbytes) <= nbytes / 150
