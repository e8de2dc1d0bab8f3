"""Draws the recompute-offload-keep curve: tokens a second over peak memory, at several batch sizes.

At each micro-batch all modes train in turns on the same windows, to the same bits. Beneath a limit
on memory, each mode's largest micro-batch that fits is compared with the others'.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.activations import (
    NUM_DIGESTS,
    Samples,
    add_training_arguments,
    measure,
    parse_training,
    peaks_of,
    require_same_numbers,
    training_of,
)
from benchmarks.activations_worker import Training, open_worker
from benchmarks.record import (
    Claim,
    Interval,
    Record,
    add_record_arguments,
    median_interval,
    paired_ratios,
    positive,
    table,
    write_record,
)
from benchmarks.spill_directory import spill_directory
from benchmarks.worker import number

MODES = ("none", "recompute", "ssd", "auto")
AGAIN = "none again"
SPEED_GOAL = 1.15  # of auto, of recompute
# Of what auto's staging leaves of the limit, for saved tensors; the rest is for what nobody saves,
# such as gradients under way.
SAVED_PART = 0.75
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Point:
    """What one micro-batch did in every mode."""

    micro_batch: int
    tokens: int
    """Of a step."""
    samples: Samples
    peaks: Mapping[str, float]
    recomputed_blocks: float
    """In a step of auto."""

    def tokens_per_s(self, mode: str) -> float:
        """Return the median."""
        return self.tokens / statistics.median(self.samples[mode]["step_s"])

    def tokens_interval(self, mode: str) -> Interval:
        """Return tokens a second, with their spread."""
        return median_interval([self.tokens / step_s for step_s in self.samples[mode]["step_s"]])

    def speed(self, mode: str, other: str) -> Interval:
        """Return how many times as fast as `other` mode `mode` is."""
        return median_interval(
            paired_ratios(self.samples[other]["step_s"], self.samples[mode]["step_s"])
        )


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=8)
    add_training_arguments(parser)
    parser.set_defaults(hidden=512, heads=8, staging_bytes=48 * MIB)
    sizes = [2, 4, 8, 12, 16]
    parser.add_argument("--micro-batches", type=positive, nargs="+", default=sizes, metavar="N")
    parser.add_argument("--limit-bytes", type=positive, default=256 * MIB, help="(256 MiB)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw a PNG")
    return parse_training(parser), parser


def point_at(
    training: Training, micro_batch: int, limit_bytes: int, *, warm_up: int, pairs: int
) -> Point:
    """Train with `micro_batch` in every mode, in turns."""
    with ExitStack() as stack:
        workers = {}
        for name in (*MODES, AGAIN):
            mode = "none" if name == AGAIN else name
            left = max(0, limit_bytes - training.staging_bytes)
            kept = int(SAVED_PART * left) if mode == "auto" else None
            subject = dataclasses.replace(training, micro_batch=micro_batch, memory_bytes=kept)
            workers[name] = stack.enter_context(open_worker(name, mode, subject))
        for _ in range(NUM_DIGESTS):
            require_same_numbers(workers)
        samples = measure(workers, warm_up=warm_up, pairs=pairs)
        answers = {mode: worker.ask("peak") for mode, worker in workers.items()}
        require_same_numbers(workers)
    again = number(answers["auto"], "recomputed_blocks")
    return Point(micro_batch, micro_batch * training.seq_len, samples, peaks_of(answers), again)


def largest_fitting(points: Sequence[Point], mode: str, limit_bytes: float) -> Point | None:
    """Return the point with the most tokens a step that `mode` can do within the limit."""
    fitting = [point for point in points if point.peaks[mode] <= limit_bytes]
    return max(fitting, key=lambda point: point.micro_batch, default=None)


def quotient(one: Interval, other: Interval) -> Interval:
    """Return the ratio of two medians that were not measured in the same rounds."""
    return Interval(
        median=one.median / other.median,
        low=one.low / other.high,
        high=one.high / other.low,
        coverage=min(one.coverage, other.coverage),
        count=min(one.count, other.count),
    )


def claims_of(points: Sequence[Point], limit_bytes: float) -> list[Claim]:
    """Return how auto compares where memory is limited."""
    best = {mode: largest_fitting(points, mode, limit_bytes) for mode in MODES}
    speeds = {
        mode: point.tokens_interval(mode) for mode, point in best.items() if point is not None
    }
    auto = speeds.pop("auto", None)
    slowest = min(speeds.values(), key=lambda speed: speed.median, default=None)
    claims = [
        Claim(
            name="tokens/s at the largest micro-batch tried that fits, auto / the slowest mode",
            sense="at least",
            goal=1.0,
            interval=quotient(auto, slowest) if auto is not None and slowest is not None else None,
            reason="" if auto is not None and slowest is not None else "auto or nothing else fits",
        )
    ]
    both = [
        point
        for point in points
        if max(point.peaks["auto"], point.peaks["recompute"]) <= limit_bytes
    ]
    common = max(both, key=lambda point: point.micro_batch, default=None)
    claims.append(
        Claim(
            name="tokens/s at the largest micro-batch tried that both fit, auto / recompute",
            sense="at least",
            goal=SPEED_GOAL,
            interval=common.speed("auto", "recompute") if common is not None else None,
            reason="" if common is not None else "no micro-batch fits in both modes",
        )
    )
    return claims


def make_record(training: Training, points: Sequence[Point], limit_bytes: int) -> Record:
    """Put the points and the claims together."""
    claims = claims_of(points, limit_bytes)
    interval = claims[-1].interval
    value = interval.median if interval is not None else None
    return Record(
        claim="within a limit on memory, planned offloading trains larger batches faster",
        goal="; ".join(f"{claim.name} {claim.sense} {claim.goal}" for claim in claims),
        claims=claims,
        value=value,
        floor=None,
        peers={
            f"tokens/s, auto / {mode}, micro-batch {point.micro_batch}": point.speed(
                "auto", mode
            ).median
            for point in points
            for mode in MODES
            if mode != "auto"
        },
        noise={
            f"step time, {AGAIN} / none, micro-batch {point.micro_batch}": point.speed(
                "none", AGAIN
            )
            for point in points
        },
        samples={str(point.micro_batch): asdict(point) for point in points},
        settings={
            **{key: value for key, value in asdict(training).items() if key != "directory"},
            "limit_bytes": limit_bytes,
        },
        facts={},
    )


def point_table(points: Sequence[Point], limit_bytes: float) -> str:
    """Return tokens a second and peak memory of everyone; what does not fit is in brackets."""
    rows = []
    for point in points:
        cells = [str(point.micro_batch)]
        for mode in MODES:
            shown = f"{point.tokens_per_s(mode):,.0f} at {point.peaks[mode] / MIB:,.0f}"
            cells.append(shown if point.peaks[mode] <= limit_bytes else f"({shown})")
        rows.append(cells)
    return table(["micro-batch", *(f"{mode}: tokens/s at MiB" for mode in MODES)], rows)


def draw(path: Path, points: Sequence[Point], limit_bytes: float) -> None:
    """Draw one line a mode, its points marked with their micro-batch."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for mode, marker in zip(MODES, "os^D", strict=True):
        peaks = [point.peaks[mode] / MIB for point in points]
        speeds = [point.tokens_per_s(mode) for point in points]
        axes.plot(peaks, speeds, marker + "-", label="keep" if mode == "none" else mode, alpha=0.8)
        for point, peak, speed in zip(points, peaks, speeds, strict=True):
            axes.annotate(
                str(point.micro_batch),
                (peak, speed),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
            )
    axes.axvline(limit_bytes / MIB, color="gray", linestyle=":", label="limit")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
    axes.set_xlabel("peak activation memory, MiB (numbers at the points: micro-batch)")
    axes.set_ylabel("tokens a second")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure and record; exits with 0 whether the goal is met or not."""
    arguments, parser = parse_arguments()
    with ExitStack() as stack:
        directory = stack.enter_context(spill_directory(arguments.offload_path, parser))
        training = training_of(arguments, directory)
        points = [
            point_at(
                training,
                micro_batch,
                arguments.limit_bytes,
                warm_up=arguments.warm_up,
                pairs=arguments.pairs,
            )
            for micro_batch in sorted(arguments.micro_batches)
        ]
    print(point_table(points, arguments.limit_bytes), end="\n\n")
    if arguments.picture is not None:
        draw(arguments.picture, points, arguments.limit_bytes)
    write_record(make_record(training, points, arguments.limit_bytes), arguments.json)


if __name__ == "__main__":
    main()
