"""Predicts the published iterations of Deep Optimizer States from those of its smallest model.

Forward, backward, flush and updates of ZeRO-3 with states on the host, as DeepSpeed does it and
with every second subgroup moved: models of 8 to 20 billion parameters, parts of the states
resident, and micro-batches of 1 to 8. Constants are those of `perfmodel.replays.fit`, which are
fitted to the 7-billion model alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import Claim, Interval, Record, add_record_arguments, table, write_record
from perfmodel.replays.deep_optimizer_states import ITERATIONS, IterationRow
from perfmodel.replays.fit import EVENLY, FITS

GOAL = 0.12
DIVISIONS = {"none": 0.0, "half": EVENLY, "all": 1.0}
"""Of what an iteration takes beside, as a part that is of its layers."""


def predicted_s(row: IterationRow, of_layers: float) -> float:
    """Return what a row takes where `of_layers` of what it takes beside is of its layers."""
    return replace(FITS[row.machine], of_layers=of_layers).predict(row).iteration_s


def errors(machine: str, of_layers: float) -> Iterator[float]:
    """Yield the errors of a machine's rows that nothing was fitted to."""
    for row in ITERATIONS:
        if row.machine == machine and not row.fitted:
            yield abs(predicted_s(row, of_layers) / row.seconds - 1)


def claim_of(machine: str) -> Claim:
    """Return the claim about one machine."""
    found = list(errors(machine, EVENLY))
    median = statistics.median(found)
    return Claim(
        name=f"median error of {len(found)} iterations on {machine} not fitted",
        sense="at most",
        goal=GOAL,
        interval=Interval(median=median, low=median, high=median, coverage=1.0, count=len(found)),
        exact=True,
    )


def main() -> None:
    """Predict and record; exits with 0 whether the goal is met or not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=0)
    arguments = parser.parse_args()
    said = {row: predicted_s(row, EVENLY) for row in ITERATIONS}
    rows = [
        [
            *(row.case, f"{row.seconds:.2f}", f"{seconds:.2f}"),
            *(f"{seconds / row.seconds - 1:+.0%}", "fitted" if row.fitted else ""),
        ]
        for row, seconds in said.items()
    ]
    print(table(["iteration", "published s", "predicted", "error", ""], rows), end="\n\n")
    claims = [claim_of(machine) for machine in FITS]
    record = Record(
        claim="a step of ZeRO-3 offload, fitted on one model's rows, predicts the larger models'",
        goal=f"median error <= {GOAL:.0%}",
        claims=claims,
        value=statistics.median(errors("H100", EVENLY)),
        floor=None,
        peers={},
        noise={},
        samples={row.case: {"iteration": [row.seconds, said[row]]} for row in ITERATIONS},
        settings={"seconds": "published, predicted", **{key: asdict(FITS[key]) for key in FITS}},
        facts={
            f"median error on {machine}, {name} of what it takes beside is of layers": (
                statistics.median(errors(machine, of_layers))
            )
            for machine in FITS
            for name, of_layers in DIVISIONS.items()
        },
    )
    write_record(record, arguments.json)


if __name__ == "__main__":
    main()
