"""A bar for each of several steps, of the bytes on each tier, as an SVG file of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Column", "chart", "round_up", "words"]

TIERS = (("device", "#3b6ea5"), ("host", "#e0a13a"), ("SSD", "#7a9e5b"))
LIMIT = "#b03030"
# The picture, and around the bars: left, top, right, below.
WIDTH, HEIGHT = 640, 400
LEFT, TOP, RIGHT, BELOW = 70, 60, 20, 60
_GIB = float(1 << 30)
_TICKS = 5


@dataclass(frozen=True)
class Column:
    """A step's bytes, by tier."""

    label: str
    tiers: tuple[int, int, int]
    """Of device, host and SSD."""
    fits: bool = True
    """Drawn pale where it does not."""


def chart(columns: Sequence[Column], *, title: str, x_label: str, limit_bytes: float) -> str:
    """Return the SVG. Bars are stacked, device first; the line is `limit_bytes` of the device."""
    most = max([limit_bytes, *(sum(each.tiers) for each in columns), 1]) / _GIB
    step = round_up(most / _TICKS)
    top = step * math.ceil(most / step)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            words(WIDTH / 2, 20, title, size=14),
            *_axes(step, top, x_label),
            *_bars(columns, top),
            *_limit(limit_bytes / _GIB, top),
            *_legend(all(each.fits for each in columns)),
            "</svg>\n",
        ]
    )


def round_up(value: float) -> float:
    """Return 1, 2 or 5 times a power of ten, at least `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(each * power for each in (1, 2, 5, 10) if each * power >= value)


def _y(value: float, top: float) -> float:
    return HEIGHT - BELOW - (HEIGHT - TOP - BELOW) * value / top


def words(x: float, y: float, text: str, *, anchor: str = "middle", size: float = 12) -> str:
    """Return a text at a place."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:.3g}">'
        f"{escape(text)}</text>"
    )


def _axes(step: float, top: float, x_label: str) -> Iterator[str]:
    for tick in range(round(top / step) + 1):
        y = _y(tick * step, top)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        yield words(LEFT - 6, y + 4, f"{tick * step:g}", anchor="end")
    yield words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 15, x_label)
    middle = (TOP + HEIGHT - BELOW) / 2
    yield f'<g transform="rotate(-90 18 {middle})">{words(18, middle, "GiB of a rank")}</g>'


def _bars(columns: Sequence[Column], top: float) -> Iterator[str]:
    room = (WIDTH - LEFT - RIGHT) / max(1, len(columns))
    # So small that no label reaches the next: a digit is a little wider than half its height.
    longest = max((len(each.label) for each in columns), default=1)
    size = min(12, room / (0.6 * (longest + 1)))
    for at, column in enumerate(columns):
        x, below = LEFT + room * (at + 0.2), 0.0
        for (name, colour), nbytes in zip(TIERS, column.tiers, strict=True):
            if nbytes:
                low, high = _y(below, top), _y(below + nbytes / _GIB, top)
                yield (
                    f'<rect x="{x:.1f}" y="{high:.1f}" width="{room * 0.6:.1f}" '
                    f'height="{low - high:.1f}" fill="{colour}" '
                    f'fill-opacity="{1 if column.fits else 0.3}">'
                    f"<title>{name}: {nbytes / _GIB:.2f} GiB</title></rect>"
                )
            below += nbytes / _GIB
        yield words(x + room * 0.3, HEIGHT - BELOW + 16, column.label, size=size)


def _limit(limit: float, top: float) -> Iterator[str]:
    y = _y(limit, top)
    yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{LIMIT}" stroke-dasharray="6 3"/>'
    yield words(WIDTH - RIGHT, y - 4, f"device limit: {limit:.3g} GiB", anchor="end")


def _legend(all_fit: bool) -> Iterator[str]:
    for at, (name, colour) in enumerate(TIERS):
        x = LEFT + 90 * at
        yield f'<rect x="{x}" y="34" width="12" height="12" fill="{colour}"/>'
        yield words(x + 18, 44, name, anchor="start")
    if not all_fit:
        yield words(LEFT + 90 * len(TIERS), 44, "pale: does not fit", anchor="start")
