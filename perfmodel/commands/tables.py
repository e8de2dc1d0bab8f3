"""Plain-text tables, and numbers as people read them. ASCII only, no colours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["ascii_line", "bar", "days", "digits", "gib", "json_text", "table"]

_GIB = float(1 << 30)
_DAYS_OF_A_YEAR = 365.25


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table; its first `left` columns begin, the others end, together."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def digits(value: float, count: int = 3) -> str:
    """Return a number with so many digits that count, without an exponent where it is readable."""
    if value and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{count - 1}e}"
    before = len(f"{abs(value):.0f}") if abs(value) >= 1 else 0
    if before:
        return f"{value:,.{max(0, count - before)}f}"
    after = count - 1
    while value and abs(value) < 10.0 ** (count - 1 - after):
        after += 1
    return f"{value:.{after}f}"


def gib(nbytes: float) -> str:
    """Return bytes in GiB."""
    return f"{nbytes / _GIB:.2f}"


def days(value: float | None) -> str:
    """Return how long a drive lasts; a dash where nobody knows."""
    if value is None:
        return "-"
    years = value / _DAYS_OF_A_YEAR
    return f"{digits(years, 2)} years" if years >= 1 else f"{digits(value, 2)} days"


def bar(part: float, width: int = 30) -> str:
    """Return a bar of which 1 is the whole width; what is more ends in `>`."""
    full = min(width, max(0, round(part * width)))
    return f"[{'#' * full}{' ' * (width - full)}{'>' if part > 1 else ']'}"


def ascii_line(text: str) -> str:
    """Return `text` in one line that any terminal shows."""
    return " ".join(text.split()).encode("ascii", "backslashreplace").decode()


def json_text(value: Any) -> str:
    """Return JSON for a file or a pipe."""
    return json.dumps(value, indent=2, allow_nan=False)
