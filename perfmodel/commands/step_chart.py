"""A step over time as an SVG file of its own: what each resource does, and the device's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from perfmodel.commands.chart import round_up, words
from perfmodel.step_timeline import Level, Span, StepTimeline

__all__ = ["step_chart"]

COLOURS = {
    "forward": "#3b6ea5",
    "backward": "#274b70",
    "recompute": "#a8c3de",
    "activations": "#e0a13a",
    "gradients": "#b06fa0",
    "gradients set to nothing": "#cccccc",
    "update": "#7a9e5b",
}
LAYERS = (
    ("always there", "#8a8f98"),
    ("activations", "#3b6ea5"),
    ("on their way", "#e0a13a"),
)
RESOURCES = ("device", "to host", "to device", "ssd write", "ssd read", "host update", "network")
WIDTH, LEFT, RIGHT, TOP = 900, 110, 20, 70
LANE, GAP, MEMORY, BELOW = 22, 40, 220, 60
_GIB = float(1 << 30)
_TICKS = 5


def step_chart(found: StepTimeline, *, title: str, peak_bytes: int) -> str:
    """Return the SVG; the line is the predicted peak, what is not tensors included."""
    lanes = [name for name in RESOURCES if any(span.resource == name for span in found.spans)]
    floor = TOP + LANE * len(lanes) + GAP
    height = floor + MEMORY + BELOW
    scale = (WIDTH - LEFT - RIGHT) / max(found.duration_s, 1e-12)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            words(WIDTH / 2, 20, title, size=14),
            *_legend(found.spans),
            *_lanes(found.spans, lanes, scale),
            *_memory(found, floor, scale, peak_bytes),
            *_seconds(found.duration_s, floor + MEMORY, scale),
            "</svg>\n",
        ]
    )


def _legend(spans: Sequence[Span]) -> Iterator[str]:
    x = LEFT
    for what, colour in COLOURS.items():
        if any(span.what == what for span in spans):
            yield f'<rect x="{x}" y="36" width="12" height="12" fill="{colour}"/>'
            yield words(x + 17, 46, what, anchor="start")
            x += 40 + 7 * len(what)


def _lanes(spans: Sequence[Span], lanes: Sequence[str], scale: float) -> Iterator[str]:
    for at, name in enumerate(lanes):
        y = TOP + LANE * at
        yield words(LEFT - 8, y + 15, name, anchor="end")
        yield f'<path d="M{LEFT} {y + LANE - 1}H{WIDTH - RIGHT}" stroke="#eee"/>'
        for span in spans:
            if span.resource == name and span.end_s > span.begin_s:
                width = max(0.3, scale * (span.end_s - span.begin_s))
                yield (
                    f'<rect x="{LEFT + scale * span.begin_s:.2f}" y="{y + 2}" '
                    f'width="{width:.2f}" height="{LANE - 5}" fill="{COLOURS[span.what]}">'
                    f"<title>{span.what}: {span.begin_s:.4g} to {span.end_s:.4g} s</title></rect>"
                )


def _memory(found: StepTimeline, floor: int, scale: float, peak_bytes: int) -> Iterator[str]:
    most = max([peak_bytes, *(level.nbytes for level in found.levels)], default=1) / _GIB
    step = round_up(max(most, 1e-9) / _TICKS)

    def y(nbytes: float) -> float:
        return floor + MEMORY - MEMORY * nbytes / _GIB / (step * _TICKS)

    for tick in range(_TICKS + 1):
        at = y(tick * step * _GIB)
        yield f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        yield words(LEFT - 8, at + 4, f"{tick * step:g}", anchor="end")
    middle = floor + MEMORY / 2
    yield f'<g transform="rotate(-90 30 {middle})">{words(30, middle, "GiB of the device")}</g>'
    for at in reversed(range(len(LAYERS))):
        name, colour = LAYERS[at]
        outline = _outline(found.levels, found.duration_s, at)
        points = " ".join(f"{LEFT + scale * s:.2f},{y(nbytes):.2f}" for s, nbytes in outline)
        yield f'<polygon points="{points}" fill="{colour}"><title>{name}</title></polygon>'
    yield (
        f'<path d="M{LEFT} {y(peak_bytes):.1f}H{WIDTH - RIGHT}" stroke="#b03030" '
        'stroke-dasharray="6 3"/>'
    )
    said = f"predicted peak: {peak_bytes / _GIB:.3g} GiB"
    yield words(WIDTH - RIGHT, y(peak_bytes) - 4, said, anchor="end")
    x = LEFT
    for name, colour in LAYERS:
        yield f'<rect x="{x}" y="{floor - 22}" width="12" height="12" fill="{colour}"/>'
        yield words(x + 17, floor - 12, name, anchor="start")
        x += 40 + 7 * len(name)


def _outline(levels: Sequence[Level], end_s: float, layers: int) -> list[tuple[float, float]]:
    """Return the outline of the sum of the first layers, down to nothing at both ends."""
    points: list[tuple[float, float]] = [(0.0, 0.0)]
    last = 0.0
    for level in levels:
        parts = (level.always_bytes, level.activation_bytes, level.moving_bytes)
        nbytes = float(sum(parts[: layers + 1]))
        points += [(level.at_s, last), (level.at_s, nbytes)]
        last = nbytes
    return [*points, (end_s, last), (end_s, 0.0)]


def _seconds(duration_s: float, y: float, scale: float) -> Iterator[str]:
    step = round_up(max(duration_s, 1e-9) / _TICKS)
    for tick in range(int(duration_s / step) + 1):
        x = LEFT + scale * tick * step
        yield f'<path d="M{x:.1f} {TOP}V{y}" stroke="#ddd" stroke-opacity="0.6"/>'
        yield words(x, y + 16, f"{tick * step:g}")
    yield words((LEFT + WIDTH - RIGHT) / 2, y + 38, "seconds")
