"""Holds what the model says against what others have published and what was measured here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfmodel.cluster import simulate_cluster
from perfmodel.machine import read_machine
from perfmodel.replays.deep_optimizer_states import (
    BY_STRIDE,
    FITTED_MODEL,
    ITERATIONS,
    RESIDENTS,
    SECONDS_BY_RESIDENT,
    SHAPES,
    STRIDES,
)
from perfmodel.replays.fit import FITS
from perfmodel.replays.formulas import estimates, layer_bytes
from perfmodel.replays.megatron import LIMIT_BYTES_PER_S, RUNS
from perfmodel.replays.ssdtrain import CASES, PUBLISHED_REDUCTION, reduction

__all__ = ["PAIRS", "Row", "Summary", "published_rows", "record_rows", "summaries", "validate"]

PAIRS = "measured, predicted"
"""What a record's settings say of the unit in which its samples are pairs of the two."""
# SSDTrain's projections are of models of this size and above.
_PROJECTED_PARAMS = 140e9


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of others, or of a measurement, and what is predicted for it."""

    source: str
    case: str
    unit: str
    """`bytes`, `s`, `bytes/s`, `params/s`, or nothing for a part of something."""
    published: float
    predicted: float
    most: float | None = None
    """Where a range is published: its upper end, `published` being the lower one."""
    fitted: bool = False
    """Constants were fitted to it, so that it proves nothing."""

    @property
    def error(self) -> float:
        """Return the relative error; of a range how far outside of it the prediction is."""
        low, high = self.published, self.published if self.most is None else self.most
        nearest = min(max(self.predicted, low), high)
        if nearest == self.predicted:
            return 0.0
        return self.predicted / nearest - 1 if nearest else float("inf")


@dataclass(frozen=True)
class Summary:
    """All rows of a source to which nothing was fitted."""

    source: str
    count: int
    median_error: float
    worst_error: float


def validate(records: Path | None = None) -> list[Row]:
    """Return all rows: what is published, and what `records`, a folder of records, holds."""
    return [*published_rows(), *(record_rows(records) if records is not None else ())]


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Return the median and the worst error of each source, in the order of their first rows."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        if not row.fitted:
            errors.setdefault(row.source, []).append(abs(row.error))
    return [
        Summary(source, len(each), statistics.median(each), max(each))
        for source, each in errors.items()
    ]


def published_rows() -> Iterator[Row]:
    """Yield every published figure, replayed."""
    for source, compared in (
        ("Korthikanti et al., activations of a layer", layer_bytes()),
        ("DeepSpeed's estimators of model states", estimates()),
    ):
        for each in compared:
            yield Row(
                source=source,
                case=each.case,
                unit="bytes",
                published=each.published,
                predicted=each.ours,
            )
    yield from _updates()
    yield from _iterations()
    yield from _reductions()
    yield from _at_scale()


def _updates() -> Iterator[Row]:
    for machine, by_model in BY_STRIDE.items():
        fit = FITS[machine].updates
        for model, row in by_model.items():
            for stride, published in zip(STRIDES, row, strict=True):
                yield Row(
                    source="Deep Optimizer States, update throughput",
                    case=f"{model} on 4 {machine}, stride {stride}",
                    unit="params/s",
                    published=published * 1e9,
                    predicted=fit.predict(model, stride) * 1e9,
                    fitted=model == FITTED_MODEL,
                )
    for stride, seconds in SECONDS_BY_RESIDENT.items():
        for resident, took_s in zip(RESIDENTS, seconds, strict=True):
            rate = FITS["H100"].updates.predict("20B", stride, resident) * 1e9
            yield Row(
                source="Deep Optimizer States, update throughput",
                case=f"20B on 4 H100, stride {stride}, {resident:.0%} resident",
                unit="params/s",
                published=SHAPES["H100"]["20B"].named / took_s,
                predicted=rate,
            )


def _iterations() -> Iterator[Row]:
    for row in ITERATIONS:
        yield Row(
            source=f"Deep Optimizer States, iterations on {row.machine}",
            case=row.case,
            unit="s",
            published=row.seconds,
            predicted=FITS[row.machine].predict(row).iteration_s,
            fitted=row.fitted,
        )


def _reductions() -> Iterator[Row]:
    least, most = PUBLISHED_REDUCTION
    for case in CASES:
        yield Row(
            source="SSDTrain, reduction of the peak",
            case=case.name,
            unit="",
            published=least,
            most=most,
            predicted=reduction(case).reduction,
        )


def _at_scale() -> Iterator[Row]:
    machine = read_machine("a100-80gb-sxm")
    for run in RUNS:
        way = "pipelines" if run.pipeline > 1 else "one stage"
        found = simulate_cluster(run.workload(), machine, recompute=True)
        yield Row(
            source=f"Megatron-LM, steps of {way}",
            case=run.name,
            unit="s",
            published=run.step_s,
            predicted=found.step_s,
        )
    for run in RUNS:
        if run.model.num_params >= _PROJECTED_PARAMS:
            yield Row(
                source="SSDTrain, bandwidth that a GPU needs",
                case=run.name,
                unit="bytes/s",
                published=0.0,
                most=LIMIT_BYTES_PER_S,
                predicted=run.write_bytes_per_s,
            )


def record_rows(folder: Path) -> Iterator[Row]:
    """Yield what was measured and predicted in each record of `folder` that says so.

    Such a record has a setting with the value `PAIRS`, whose key is the unit; samples are objects
    of pairs. Raises OSError for a folder or file not readable, ValueError for one that is no record
    or breaks what it says.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder of records")
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        settings = record.get("settings") if isinstance(record, Mapping) else None
        if not isinstance(settings, Mapping):
            raise ValueError(f"{path} is no record: it has no settings")
        units = [str(key) for key, value in settings.items() if value == PAIRS]
        if units:
            yield from _pairs(path, record.get("samples"), units[0])


def _pairs(path: Path, samples: Any, unit: str) -> Iterator[Row]:
    if not isinstance(samples, Mapping):
        raise ValueError(f"{path}: samples={samples!r} is not an object")
    for case, quantities in samples.items():
        if not isinstance(quantities, Mapping):
            raise ValueError(f"{path}: samples.{case}={quantities!r} is not an object of pairs")
        for quantity, pair in quantities.items():
            if not _is_pair(pair):
                raise ValueError(f"{path}: samples.{case}.{quantity}={pair!r} is not a pair")
            yield Row(
                source=f"{path.name}, {quantity}",
                case=str(case),
                unit=unit,
                published=float(pair[0]),
                predicted=float(pair[1]),
            )


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == 2
        and all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in value)
    )
