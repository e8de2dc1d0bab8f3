"""Paired ratios, their intervals and the verdicts drawn from them, on numbers known beforehand."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.record import Claim, Interval, Record, median_interval, paired_ratios, round_order


def interval(low: float, median: float, high: float, coverage: float = 0.96) -> Interval:
    return Interval(median=median, low=low, high=high, coverage=coverage, count=24)


def claim(sense: str, goal: float, found: Interval | None, *, exact: bool = False) -> Claim:
    return Claim(name="c", sense=sense, goal=goal, interval=found, exact=exact)  # type: ignore[arg-type]


def some_record(claims: list[Claim]) -> Record:
    return Record(
        claim="a is fast",
        goal="a >= b",
        claims=claims,
        value=1.0,
        floor=None,
        peers={"b": 1.0, "c": None},
        noise={"a again / a": interval(0.9, 1.0, 1.1)},
        samples={"a": {"wall_s": [1.0, math.inf]}},
        settings={},
        absent={"c": "not installed"},
    )


def test_the_interval_of_24_leaves_out_6_on_each_side() -> None:
    found = median_interval([float(i) for i in range(24, 0, -1)])
    assert (found.median, found.low, found.high) == (12.5, 7.0, 18.0)
    # 1 - 2 P(at most 6 heads of 24), from the binomial table.
    assert found.coverage == pytest.approx(0.97734, abs=1e-5)


def test_the_interval_of_25_is_the_tables() -> None:
    found = median_interval([float(i) for i in range(1, 26)])
    assert (found.median, found.low, found.high) == (13.0, 8.0, 18.0)
    assert found.coverage == pytest.approx(0.95671, abs=1e-5)


def test_six_samples_are_the_fewest_that_make_95_per_cent() -> None:
    six = median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    assert (six.low, six.median, six.high, six.coverage) == (1.0, 3.5, 6.0, 1 - 2 / 64)
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]).coverage == 1 - 2 / 32


def test_one_sample_has_a_range_and_no_coverage() -> None:
    one = median_interval([7.0])
    assert (one.low, one.median, one.high, one.coverage) == (7.0, 7.0, 7.0, 0.0)


def test_an_outlier_moves_neither_median_nor_interval() -> None:
    usual = [1.0 + i / 100 for i in range(24)]
    assert median_interval(usual) == median_interval([*usual[:-1], 1000.0])


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        median_interval([])


def test_ratios_are_taken_round_by_round() -> None:
    # Both slow down fourfold in the second round; the ratio must not notice.
    assert paired_ratios([1.0, 4.0], [2.0, 8.0]) == [0.5, 0.5]


def test_unequal_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rounds against 1"):
        paired_ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize("names", ["ab", "abc", "abcd", "abcde", "abcdef"])
def test_everyone_has_every_place_and_follows_everyone_equally_often(names: str) -> None:
    rounds = len(names) * (1 + len(names) % 2)
    orders = [round_order(list(names), index) for index in range(rounds)]
    assert all(sorted(order) == sorted(names) for order in orders)
    for place in range(len(names)):
        assert Counter(order[place] for order in orders) == dict.fromkeys(
            names, rounds // len(names)
        )
    follows = Counter(pair for order in orders for pair in pairwise(order))
    assert follows == dict.fromkeys(permutations(names, 2), rounds // len(names))


@pytest.mark.parametrize(
    ("sense", "found", "met"),
    [
        ("at least", interval(0.98, 1.0, 1.1), True),
        ("at least", interval(0.96, 1.0, 1.1), False),  # noise must not meet a goal
        ("at least", interval(0.90, 0.92, 0.95), False),
        ("at most", interval(0.90, 0.95, 0.97), True),
        ("at most", interval(0.90, 0.95, 0.98), False),
        ("at most", interval(0.90, 0.95, math.inf), False),
        ("at least", interval(1.0, 1.0, 1.0, coverage=0.9375), None),  # five rounds
        ("at least", None, None),
    ],
)
def test_a_claim_is_met_by_its_whole_interval(
    sense: str, found: Interval | None, met: bool | None
) -> None:
    assert claim(sense, 0.97, found).met is met


def test_what_is_counted_needs_one_sample_only() -> None:
    once = Interval(median=0.2, low=0.2, high=0.2, coverage=0.0, count=1)
    assert claim("at most", 0.2, once, exact=True).met is True
    assert claim("at most", 0.19, once, exact=True).met is False
    assert claim("at most", 0.2, once).met is None


def test_a_record_is_met_by_all_of_its_claims_and_undecided_without_a_peer() -> None:
    good = claim("at least", 0.9, interval(1.0, 1.0, 1.0))
    bad = claim("at least", 2.0, interval(1.0, 1.0, 1.0))
    absent = claim("at least", 1.0, None)
    assert some_record([good, good]).met is True
    assert some_record([good, bad]).met is False
    assert some_record([good, absent]).met is None


def test_the_json_has_every_field_of_the_contract_and_no_infinity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    record.write_record(some_record([claim("at least", 1.0, None)]), path)
    written = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    contract = "claim goal value met peers floor machine versions commit command samples"
    assert set(contract.split()) <= set(written)
    assert written["met"] is None
    assert written["peers"] == {"b": 1.0, "c": None}
    assert written["samples"] == {"a": {"wall_s": [1.0, None]}}
    assert written["machine"]["cores"] >= 1
    assert written["versions"]["torch"]
    printed = capsys.readouterr().out
    assert "a is fast: undecided" in printed
    assert "c: not installed" in printed


def test_the_command_is_told_from_the_top_of_the_repository() -> None:
    script = str(record.ROOT / "benchmarks" / "io.py")
    told = record.command_line(
        [script, "--json", "/somewhere/else.json", "--picture", "b.png", "--path", "a b"]
    )
    assert told == "python benchmarks/io.py --path 'a b'"


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many"])
def test_a_count_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="whole number above 0"):
        record.positive(text)


def test_a_record_that_could_not_be_written_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    record.add_record_arguments(parser, warm_up=2)
    for wrong in (tmp_path, tmp_path / "missing" / "record.json"):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(["--json", str(wrong)])
        assert stopped.value.code == 2
        assert str(wrong) in capsys.readouterr().err
    assert parser.parse_args(["--json", str(tmp_path / "record.json")]).warm_up == 2


def test_a_table_is_aligned() -> None:
    lines = record.table(["", "ratio", ""], [["a", "1.0", "met"], ["longer", "10.25", ""]])
    assert lines.splitlines() == ["        ratio", "a         1.0  met", "longer  10.25"]


def test_a_row_tells_a_miss_from_a_doubt() -> None:
    rows = {
        "met": interval(0.99, 1.0, 1.01),
        "NOT met": interval(0.90, 0.92, 0.99),
        "NOT met beyond noise": interval(0.90, 0.98, 1.0),
    }
    for verdict, found in rows.items():
        shown = claim("at least", 0.97, found).row()[-1]
        assert shown.split(":")[0] == verdict
        assert claim("at least", 0.97, found).met is (verdict == "met")
