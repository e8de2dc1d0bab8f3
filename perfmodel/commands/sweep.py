"""`perfmodel plan --sweep`: what fits for each of several lengths or batches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from perfmodel.commands.arguments import parse_whole
from perfmodel.commands.asked import Asked, asked
from perfmodel.commands.chart import Column, chart
from perfmodel.commands.described import (
    HEADER,
    NOTHING_FITS,
    activations_of,
    batch_of,
    figures,
    heading,
    nothing_fits,
    prediction_json,
    states_of,
)
from perfmodel.commands.tables import ascii_line, bar, json_text, table
from perfmodel.plan import nearest
from perfmodel.planner import Found, Search, limits_of, plan

__all__ = ["run_sweep", "sweep_values"]

KEYS = ("seq-len", "micro-batch")

Swept = list[tuple[int, Found]]


def sweep_values(text: str) -> tuple[str, list[int]]:
    """Return the key and the values of `KEY=LOW:HIGH`, each twice the last. Raises ValueError."""
    key, _, span = text.partition("=")
    if key not in KEYS:
        raise ValueError(f"--sweep {key!r} is not {' or '.join(KEYS)}{nearest(key, KEYS)}")
    low, colon, high = span.partition(":")
    try:
        first, last = parse_whole(low), parse_whole(high)
    except ValueError:
        first = last = 0
    if not colon or not 0 < first <= last:
        raise ValueError(f"--sweep {text!r} is not KEY=LOW:HIGH, as {key}=4096:131072")
    values = []
    while first <= last:
        values.append(first)
        first *= 2
    return key, values


def run_sweep(
    arguments: argparse.Namespace, search_of: Callable[[argparse.Namespace, Asked], Search]
) -> int:
    """Search for each value and print. Raises ValueError and OSError for what cannot be used."""
    key, values = sweep_values(arguments.sweep)
    output = arguments.output
    if output is not None and not output.endswith(".svg"):
        raise ValueError(f"-o {output}: a --sweep writes a chart, as chart.svg, and no plan")
    if arguments.emit is not None:
        raise ValueError("--emit does not go with --sweep: it prints one plan")
    name = key.replace("-", "_")
    if getattr(arguments, name) is not None:
        raise ValueError(f"--{key} and --sweep {key} say the same; give one of them")
    found: Swept = []
    for value in values:
        setattr(arguments, name, value)
        wanted = asked(arguments)
        search = search_of(arguments, wanted)
        if name == "micro_batch":  # none is split into smaller ones
            search = replace(search, micro_batches=(value,))
        found.append((value, plan(wanted.workload, wanted.used_machine, wanted.limits, search)))
    if output is not None:
        Path(output).write_text(_chart(key, found, wanted), encoding="utf-8")
    print(json_text(_json(key, found, wanted)) if arguments.json else _text(key, found, wanted))
    if not any(each.choices for _, each in found):
        print(f"perfmodel: {nothing_fits(found[0][1])}", file=sys.stderr)
        return NOTHING_FITS
    return 0


def _limit(wanted: Asked) -> float:
    return limits_of(wanted.used_machine, wanted.limits)["device_bytes"]


def _text(key: str, found: Swept, wanted: Asked) -> str:
    limit = _limit(wanted)
    rows = []
    for value, each in found:
        best = each.choices[0].prediction if each.choices else each.closest
        if best is None:
            rows.append([f"{value}", "nothing fits", *[""] * len(HEADER)])
            continue
        fits = activations_of(best) if each.choices else f"nothing fits: {activations_of(best)}"
        drawn = bar(best.device_bytes / limit)
        cells = [fits, states_of(best), batch_of(best), *figures(best, wanted.used_machine)]
        rows.append([f"{value}", *cells, drawn])
    header = (key, *HEADER[1:], "device".ljust(len(bar(1.0))))
    lines = [
        heading(wanted.workload, wanted.machine, batch=False),
        *map(ascii_line, wanted.notes),
        "",
    ]
    return "\n".join([*lines, *table(header, rows, left=4)])


def _chart(key: str, found: Swept, wanted: Asked) -> str:
    columns = []
    for value, each in found:
        best = each.choices[0].prediction if each.choices else each.closest
        tiers = (best.device_bytes, best.host_bytes, best.ssd_bytes) if best else (0, 0, 0)
        columns.append(Column(f"{value}", tiers, fits=bool(each.choices)))
    title = f"{wanted.workload.model.name or 'a model'} on {wanted.machine.name}"
    return chart(columns, title=title, x_label=key, limit_bytes=_limit(wanted))


def _json(key: str, found: Swept, wanted: Asked) -> list[dict[str, Any]]:
    return [
        {
            key.replace("-", "_"): value,
            "tried": each.tried,
            "fitting": each.fitting,
            "best": prediction_json(each.choices[0].prediction, wanted.used_machine)
            if each.choices
            else None,
            "over": dict(each.over) if each.over is not None else None,
            "change": each.change,
        }
        for value, each in found
    ]
