"""Tests of `offload.activations.rates`: what counts as a measurement, and what as news."""

from __future__ import annotations

import math

from offload.activations.rates import LEAST_BYTES, Rates, Throughput

GIB = 1 << 30


def test_too_little_says_nothing() -> None:
    rates = Rates()
    assert not rates.observe((LEAST_BYTES - 1, 0.01), (0, 0))
    assert not rates.observe((GIB, 1e-3), (0, 0)), "an instant"
    assert all(map(math.isnan, rates.throughput))
    assert rates.throughput.known() is None


def test_a_drive_that_does_nothing_for_long_is_known_to_be_slow() -> None:
    rates = Rates()
    assert rates.observe((0, 1.0), (0, 0))
    assert rates.throughput.write_bytes_per_s == 1


def test_the_latest_weighs_as_much_as_all_before() -> None:
    rates = Rates()
    rates.observe((GIB, 1.0), (GIB, 1.0))
    rates.observe((4 * GIB, 2.0), (GIB, 1.0))
    assert rates.throughput == Throughput(2 * GIB, GIB)


def test_until_it_has_read_it_is_taken_to_read_as_it_writes() -> None:
    rates = Rates()
    rates.observe((GIB, 1.0), (0, 0))
    assert rates.throughput.known() == Throughput(GIB, GIB, GIB)


def test_both_at_once_are_known_once_they_were_seen_together() -> None:
    rates = Rates()
    both = (4 * GIB, 1.0), (2 * GIB, 1.0)
    assert rates.observe(*both, (0, 0))
    assert rates.throughput.known() == Throughput(4 * GIB, 2 * GIB, 4 * GIB)
    assert not rates.observe(*both, (GIB, 1.0)), "neither direction has anything new"
    assert rates.throughput.known() == Throughput(4 * GIB, 2 * GIB, GIB)
    rates = Rates()
    rates.observe(*both, (8 * GIB, 1.0))
    assert rates.throughput.known() == Throughput(4 * GIB, 2 * GIB, 4 * GIB)


def test_what_was_slow_at_both_once_is_tried_again() -> None:
    rates = Rates()
    rates.observe((GIB, 1.0), (GIB, 1.0), (GIB / 8, 1.0))
    for step in range(2, 200):
        rates.observe((step * GIB, step), (step * GIB, step), (GIB / 8, 1.0))
        known = rates.throughput.known()
        assert known is not None
        if step < 8:
            assert known.mixed_bytes_per_s == GIB / 8
    assert known.mixed_bytes_per_s == GIB
    # However long that was, what is seen again counts at once.
    rates.observe((200 * GIB, 200), (200 * GIB, 200), (GIB / 4, 2.0))
    assert rates.throughput.mixed_bytes_per_s == (GIB + GIB / 8) / 2


def test_a_drive_that_suffers_from_both_at_once_is_news_once() -> None:
    planned = Throughput(100.0, 50.0).known()
    assert planned is not None
    seen = Throughput(100.0, 50.0, 60.0)
    assert seen.differs(planned)
    now = seen.known()
    assert now is not None
    assert not seen.differs(now)
    assert not Throughput(100.0, 50.0, 130.0).differs(planned)


def test_a_fifth_more_or_less_is_news() -> None:
    planned = Throughput(100.0, 100.0)
    assert not Throughput(119.0, 84.0).differs(planned)
    assert Throughput(100.0, 83.0).differs(planned)
    assert Throughput(121.0, math.nan).differs(planned)
    assert not Throughput(math.nan, math.nan).differs(planned)
    for rate, much in ((51.0, False), (199.0, False), (49.0, True), (201.0, True)):
        assert Throughput(rate, math.nan).differs(planned, 1.0) is much
