"""Predicts the published sweeps of Deep Optimizer States from the rows of one of its models.

The rates of each machine are fitted to the update throughput of the 7-billion-parameter model at
seven strides; the timeline then says what the larger models did, at each stride and with parts of
the states resident. Figures are those of the authors' results (arXiv 2410.21316 and its raw logs):
four GPUs, a hundred million parameters a subgroup, billions of parameters a second of the node.

Those are the number in a model's name over the seconds (8.6 x 2.3 s is 20, for the "20B"), but what
was updated follows from its shape: 17.3 billion. Counted so, the baselines of all five published
models lie within 5 % of each other; by name they are up to 47 % apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import Claim, Interval, Record, add_record_arguments, table, write_record
from perfmodel.replays.deep_optimizer_states import (
    BY_STRIDE,
    RESIDENTS,
    SECONDS_BY_RESIDENT,
    SHAPES,
    STRIDES,
    sizes_of,
)
from perfmodel.replays.fit import UpdateFit, fitted_updates
from perfmodel.schedules.updates import plan_updates, simulate_updates, stride_schedule

GOAL = 0.10


class Point(NamedTuple):
    """One published figure and what is predicted for it, billions of parameters a second."""

    machine: str
    model: str
    stride: int
    resident: float
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Return the relative error."""
        return self.predicted / self.published - 1


def points_of(machine: str, fit: UpdateFit) -> Iterator[Point]:
    """Yield all that is published of a machine."""
    for model, row in BY_STRIDE[machine].items():
        for stride, published in zip(STRIDES, row, strict=True):
            yield Point(machine, model, stride, 0.0, published, fit.predict(model, stride))
    if machine == "H100":
        for stride, seconds in SECONDS_BY_RESIDENT.items():
            for resident, took_s in zip(RESIDENTS, seconds, strict=True):
                published = SHAPES[machine]["20B"].named / took_s / 1e9
                predicted = fit.predict("20B", stride, resident)
                yield Point(machine, "20B", stride, resident, published, predicted)


def speedup_error(points: Sequence[Point]) -> float:
    """Return the median error of how many times as fast as its model's own baseline a point is."""
    errors = []
    for point in points:
        baseline = next(
            other
            for other in points
            if other[:3] == (point.machine, point.model, 0) and not other.resident
        )
        published = point.published / baseline.published
        errors.append(abs(point.predicted / baseline.predicted / published - 1))
    return statistics.median(errors)


def gain_of_a_fraction(fit: UpdateFit, buffers: int) -> float:
    """Return how many times as fast as every second subgroup the best share is."""
    rates, sizes = fit.rates(2), sizes_of(SHAPES[fit.machine]["20B"])
    best = simulate_updates(plan_updates(sizes, rates, buffers=buffers), rates).duration_s
    every_second = stride_schedule(sizes, 2, buffers=buffers)
    return simulate_updates(every_second, rates).duration_s / best


def draw(path: Path, points: Sequence[Point]) -> None:
    """Draw predicted over published."""
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    for model, marker in zip(BY_STRIDE["H100"], "os^", strict=True):
        mine = [point for point in points if point.model == model]
        label = f"{model}, fitted" if model == "7B" else model
        axes.plot(
            [point.published for point in mine],
            [point.predicted for point in mine],
            marker,
            alpha=0.7,
            label=label,
        )
    most = max(max(point.published, point.predicted) for point in points)
    for factor, style in ((1.0, "-"), (1 - GOAL, ":"), (1 + GOAL, ":")):
        axes.plot([0, most], [0, factor * most], style, color="gray", linewidth=0.8)
    axes.set_xlabel("published update throughput, billions of parameters a second")
    axes.set_ylabel("predicted")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Fit, predict and record; exits with 0 whether the goal is met or not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=0)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw a PNG")
    arguments = parser.parse_args()
    fits = {machine: fitted_updates(machine) for machine in BY_STRIDE}
    points = [point for machine, fit in fits.items() for point in points_of(machine, fit)]
    unseen = [point for point in points if point.model != "7B"]
    rows = [
        [
            *(point.machine, point.model, str(point.stride), f"{point.resident:.0%}"),
            *(f"{point.published:.1f}", f"{point.predicted:.1f}", f"{point.error:+.0%}"),
        ]
        for point in points
    ]
    columns = ["machine", "model", "stride", "resident", "published", "predicted", "error"]
    print(table(columns, rows), end="\n\n")
    if arguments.picture is not None:
        draw(arguments.picture, points)
    value = statistics.median(abs(point.error) for point in unseen)
    record = Record(
        claim="the model of updates, fitted on one model's rows, predicts the larger models'",
        goal=f"median error <= {GOAL:.0%}",
        claims=[
            Claim(
                name=f"median error of {len(unseen)} figures not fitted",
                sense="at most",
                goal=GOAL,
                interval=Interval(
                    median=value, low=value, high=value, coverage=1.0, count=len(unseen)
                ),
                exact=True,
            )
        ],
        value=value,
        floor=None,
        peers={
            f"the best share / every second subgroup, {machine}, {buffers} buffers": (
                gain_of_a_fraction(fit, buffers)
            )
            for machine, fit in fits.items()
            for buffers in (1, 3)
        },
        noise={},
        samples={"points": [list(point) for point in points]},
        settings={machine: vars(fit) for machine, fit in fits.items()},
        facts={"median error of the gain over the same model's baseline": speedup_error(unseen)},
    )
    write_record(record, arguments.json)


if __name__ == "__main__":
    main()
