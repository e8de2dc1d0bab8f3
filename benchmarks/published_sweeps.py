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
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import Claim, Interval, Record, add_record_arguments, table, write_record
from perfmodel.schedules.updates import (
    UpdateRates,
    plan_updates,
    simulate_updates,
    stride_schedule,
)

GOAL = 0.10
NUM_GPUS, SUBGROUP = 4, 100_000_000
STRIDES = (0, 2, 3, 4, 6, 8, 10)
"""0: nothing moves, as in the original's baseline, ZeRO-3."""
VOCABULARY = 50304


class Shape(NamedTuple):
    """Of a decoder with SwiGLU, its embeddings and its head apart from each other."""

    named: float
    hidden: int
    feedforward: int
    layers: int

    @property
    def params(self) -> int:
        """Return how many there are; the norms' do not count."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.feedforward
        return self.layers * layer + 2 * VOCABULARY * self.hidden


SHAPES = {
    "H100": {
        "7B": Shape(7e9, 4096, 11008, 32),
        "13B": Shape(13e9, 5120, 13824, 40),
        "20B": Shape(20e9, 5120, 20480, 40),
    },
    "A100": {
        "7B": Shape(7e9, 4096, 11008, 32),
        "13B": Shape(13e9, 5120, 13824, 40),
        # Layers and hidden size are published; the rest as the other one has it, 4 x hidden.
        "20B": Shape(20e9, 4096, 16384, 64),
    },
}
BY_STRIDE = {
    "H100": {
        "7B": (7.8, 14.2, 13.4, 12.5, 11.6, 10.9, 11.1),
        "13B": (7.7, 13.6, 13.2, 12.2, 11.3, 10.7, 10.7),
        "20B": (8.6, 15.3, 14.9, 14.2, 13.3, 13.0, 12.7),
    },
    "A100": {
        "7B": (3.5, 5.3, 4.8, 4.8, 4.7, 4.6, 4.7),
        "13B": (3.5, 5.0, 4.8, 4.6, 4.5, 4.4, 4.3),
        "20B": (3.8, 5.7, 5.6, 5.3, 5.1, 5.1, 5.1),
    },
}
RESIDENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SECONDS_BY_RESIDENT = {0: (2.3, 2.0, 1.8, 1.6, 1.4, 1.2), 2: (1.3, 1.1, 1.0, 0.9, 0.8, 0.7)}
"""Of the update of the 20-billion model on H100s, by stride."""
# Fused updates on the device are bound by its memory: 28 bytes a parameter at some 2 TB/s.
DEVICE_PARAMS_PER_S = 7e10


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


@dataclass(frozen=True)
class Fit:
    """What is not published, of each GPU's share of a machine."""

    machine: str
    plain_params_per_s: float
    """Updated on the host where nothing moves: parameters are rounded and sent after it."""
    host_params_per_s: float
    """Updated on the host while that goes on beside it, as the original does when others move."""
    link_bytes_per_s: float
    subgroup_s: float

    def rates(self, stride: int) -> UpdateRates:
        """Return the machine; the original has one queue for both directions of the states."""
        return UpdateRates(
            device_params_per_s=DEVICE_PARAMS_PER_S,
            host_params_per_s=self.host_params_per_s if stride else self.plain_params_per_s,
            to_device_bytes_per_s=self.link_bytes_per_s,
            to_host_bytes_per_s=self.link_bytes_per_s,
            subgroup_s=self.subgroup_s,
        )

    def predict(self, model: str, stride: int, resident: float = 0.0) -> float:
        """Return the node's update throughput, as it is published: see the top."""
        shape = SHAPES[self.machine][model]
        schedule = stride_schedule(sizes_of(shape), stride, resident=resident)
        return shape.named / simulate_updates(schedule, self.rates(stride)).duration_s / 1e9


def sizes_of(shape: Shape) -> tuple[int, ...]:
    """Return the subgroups of one GPU."""
    whole, rest = divmod(shape.params // NUM_GPUS, SUBGROUP)
    return (SUBGROUP,) * whole + ((rest,) if rest else ())


def fitted(machine: str) -> Fit:
    """Return the rates with which the 7-billion model's row comes out best."""
    row = BY_STRIDE[machine]["7B"]

    def badness(values: Sequence[float]) -> float:
        fit = Fit(machine, *values)
        predicted = [fit.predict("7B", stride) for stride in STRIDES]
        return sum(math.log(one / other) ** 2 for one, other in zip(predicted, row, strict=True))

    start = row[0] / NUM_GPUS * 1e9
    ends = [
        descended(badness, [start, 1.3 * start, link_bytes_per_s, 1e-3])
        for link_bytes_per_s in (1.5e10, 4e10)  # one valley's bottom is not the other's
    ]
    return Fit(machine, *min(ends, key=badness))


def descended(badness: Callable[[Sequence[float]], float], start: Sequence[float]) -> list[float]:
    """Return positive numbers near `start` at which `badness` is least, one at a time."""
    found, best, step = list(start), badness(start), 0.3
    while step > 2e-3:
        improved = False
        for place in range(len(found)):
            for factor in (1 + step, 1 / (1 + step)):
                tried = [*found]
                tried[place] *= factor
                if (now := badness(tried)) < best:
                    found, best, improved = tried, now, True
        step = step if improved else step / 2
    return found


def points_of(machine: str, fit: Fit) -> Iterator[Point]:
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


def gain_of_a_fraction(fit: Fit, buffers: int) -> float:
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
    fits = {machine: fitted(machine) for machine in BY_STRIDE}
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
