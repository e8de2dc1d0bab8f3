"""`perfmodel validate`: predictions beside what others have published, and what was recorded."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from perfmodel.commands.arguments import Parser
from perfmodel.commands.tables import ascii_line, digits, json_text, table
from perfmodel.validate import Row, summaries, validate

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Add the records, and JSON."""
    parser.add_argument("--records", metavar="DIR", help="a folder of records of benchmarks")
    parser.add_argument("--json", action="store_true", help="print all as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print every row and each source's median."""
    rows = validate(Path(arguments.records) if arguments.records is not None else None)
    found = summaries(rows)
    if arguments.json:
        listed = [{**asdict(row), "error": _finite(row.error)} for row in rows]
        medians = [asdict(each) for each in found]
        print(json_text({"rows": listed, "summaries": medians}))
        return 0
    source = ""
    for row in rows:
        if row.source != source:
            source = row.source
            print(f"{ascii_line(source)}\n" + "\n".join(_rows(rows, source)) + "\n")
    medians_rows = [
        [
            ascii_line(each.source),
            f"{each.count}",
            _percent(each.median_error),
            _percent(each.worst_error),
        ]
        for each in found
    ]
    print("\n".join(table(("source", "rows", "median error", "worst"), medians_rows)))
    return 0


def _rows(rows: list[Row], source: str) -> list[str]:
    cells = [
        [
            f"  {ascii_line(row.case)}",
            digits(row.published) + (f" to {digits(row.most)}" if row.most is not None else ""),
            digits(row.predicted),
            row.unit,
            _percent(row.error) + (" (fitted)" if row.fitted else ""),
        ]
        for row in rows
        if row.source == source
    ]
    return table(("  case", "published", "predicted", "unit", "error"), cells)


def _percent(error: float) -> str:
    return f"{error:.1%}"


def _finite(error: float) -> float | None:
    return error if abs(error) != float("inf") else None
