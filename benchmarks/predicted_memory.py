"""Holds the peaks that are predicted from a model's shape against those of steps that were run."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.activations_worker import Training, open_worker
from benchmarks.record import (
    Claim,
    Interval,
    Record,
    add_record_arguments,
    positive,
    table,
    write_record,
)
from benchmarks.spill_directory import spill_directory
from benchmarks.worker import number
from perfmodel.layers import tape_of
from perfmodel.memory import step_bytes
from perfmodel.plain_models import PLAIN_MODELS, plain_model, plain_shape
from perfmodel.plan import OptimizerConfig
from perfmodel.states import held, held_bytes
from perfmodel.workload import Strategy, Workload

MIB = 1 << 20
MEDIAN_GOAL, WORST_GOAL = 0.03, 0.06
# layers, hidden, heads, sequence, micro-batch, vocabulary
SIZES = (
    (4, 512, 8, 256, 4, 256),
    (6, 384, 6, 512, 2, 4096),
    (3, 768, 12, 256, 8, 256),
)
MODES = {"keep": "none", "recompute": "recompute", "ssd": "ssd"}
# Of `offload.AdamW`'s states, with the first size; all else is with torch.optim.AdamW.
PLACEMENTS = ("host", "ssd")
PLACED_MODES = ("keep", "ssd")


class Run(NamedTuple):
    """One model, size and mode; `placement`: of states, where PyTorch does not have them."""

    model: str
    size: tuple[int, ...]
    mode: str
    placement: str = ""

    @property
    def name(self) -> str:
        """What its samples are called."""
        size = "x".join(map(str, self.size))
        return " ".join(filter(None, (self.model, size, self.mode, self.placement)))


def runs_of(models: Sequence[str], sizes: Sequence[tuple[int, ...]]) -> list[Run]:
    """Return every model, size and mode, and with the first size other places of states."""
    plain = [Run(*case) for case in itertools.product(models, sizes, MODES)]
    placed = itertools.product(models, sizes[:1], PLACED_MODES, PLACEMENTS)
    return plain + [Run(*case) for case in placed]


def training_of(run: Run, directory: str) -> Training:
    """Return what the worker of a run trains."""
    layers, hidden, heads, seq_len, micro_batch, vocab = run.size
    return Training(
        model=run.model,
        layers=layers,
        hidden=hidden,
        heads=heads,
        seq_len=seq_len,
        micro_batch=micro_batch,
        vocab=vocab,
        dropout=0.0,
        optimizer="adamw",
        threads=2,
        directory=directory,
        staging_bytes=48 * MIB,
        min_tensor_bytes=MIB,
        io_engine="auto",
        verify=True,
        schedule="all",
        placement=run.placement,
    )


def predicted_bytes(run: Run, training: Training) -> tuple[float, float]:
    """Return the predicted peak of a step above the process at rest, and what is there at rest.

    The peak is that of forward and backward, or of the update where that needs more.
    """
    seq_len = training.seq_len
    model = plain_model(
        run.model,
        num_layers=training.layers,
        hidden_size=training.hidden,
        num_heads=training.heads,
        seq_len=seq_len,
        vocab_size=training.vocab,
    )
    items = held(
        Workload(model=model, seq_len=seq_len, dtype="float32", plain=run.model),
        Strategy(placement=run.placement) if run.placement else Strategy(optimizer="torch"),
        device_is_host=True,
        settings=OptimizerConfig(
            subgroup_params=training.subgroup_params, staging_bytes=training.staging_bytes
        ),
    )
    resting = held_bytes(items, "device")
    tape = tape_of(model, plain_shape(run.model, batch=training.micro_batch, seq_len=seq_len))
    if run.mode == "ssd":  # staging counts: it is in memory
        found = step_bytes(tape, leaves=lambda value: value.nbytes >= training.min_tensor_bytes)
        staging = training.staging_bytes
    else:
        found = step_bytes(tape, range(len(tape.blocks)) if run.mode == "recompute" else ())
        staging = 0
    computed = held_bytes(items, "device", "backward") + found.worst.nbytes
    peak = max(computed, held_bytes(items, "device", "update"))
    return peak + staging - resting, resting


def measured_bytes(run: Run, training: Training) -> tuple[float, float]:
    """Return the same as measured in a process of its own."""
    with open_worker(run.mode, MODES[run.mode], training) as worker:
        for _ in range(2):  # the first makes what stays
            worker.ask("step")
        answer = worker.ask("peak")
    keys = ("torch_peak_bytes", "native_peak_bytes", "page_cache_bytes")
    return sum(number(answer, key) for key in keys), number(answer, "resting_bytes")


def claim_of(name: str, errors: list[float], goal: float, *, worst: bool) -> Claim:
    """Return a claim about errors of predictions, which are counted and not sampled."""
    value = max(errors) if worst else statistics.median(errors)
    exactly = Interval(median=value, low=value, high=value, coverage=1.0, count=len(errors))
    return Claim(name=name, sense="at most", goal=goal, interval=exactly)


def parsed() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=0)
    add = parser.add_argument
    add("--offload-path", type=Path, metavar="DIR", help="on the drive to use (build/spill)")
    add("--models", nargs="+", choices=PLAIN_MODELS, default=PLAIN_MODELS, help="(all)")
    add("--sizes", type=positive, default=len(SIZES), metavar="N", help="the first N (all)")
    return parser.parse_args(), parser


def make_record(samples: Mapping[str, Mapping[str, tuple[float, float]]]) -> Record:
    """Put what was measured and predicted of each run together."""
    peaks = [abs(said / seen - 1) for seen, said in (each["peak"] for each in samples.values())]
    totals = [
        abs((each["peak"][1] + each["resting"][1]) / (each["peak"][0] + each["resting"][0]) - 1)
        for each in samples.values()
    ]
    return Record(
        claim=f"the peak of {len(samples)} runs is predicted from shapes alone",
        goal=f"median error <= {MEDIAN_GOAL}, worst <= {WORST_GOAL}",
        claims=[
            claim_of("median error, activations", peaks, MEDIAN_GOAL, worst=False),
            claim_of("worst error, activations", peaks, WORST_GOAL, worst=True),
            claim_of("median error, all memory", totals, MEDIAN_GOAL, worst=False),
            claim_of("worst error, all memory", totals, WORST_GOAL, worst=True),
        ],
        value=statistics.median(peaks),
        floor=None,
        peers={},
        noise={},
        samples=samples,
        settings={
            "sizes": SIZES,
            "modes": list(MODES),
            "placements": PLACEMENTS,
            "bytes": "measured, predicted",
        },
        facts={},
    )


def main() -> None:
    """Measure and record; exits with 0 whether the goal is met or not."""
    arguments, parser = parsed()
    runs = runs_of(arguments.models, SIZES[: arguments.sizes])
    samples: dict[str, dict[str, tuple[float, float]]] = {}
    with ExitStack() as stack:
        directory = stack.enter_context(spill_directory(arguments.offload_path, parser))
        for run in tqdm(runs, desc="runs"):
            training = training_of(run, directory)
            (peak, resting), said = measured_bytes(run, training), predicted_bytes(run, training)
            samples[run.name] = {"peak": (peak, said[0]), "resting": (resting, said[1])}
    rows = [
        [name, f"{seen / MIB:.1f}", f"{said / MIB:.1f}", f"{said / seen - 1:+.2%}"]
        for name, (seen, said) in ((name, each["peak"]) for name, each in samples.items())
    ]
    print(table(["run", "measured MiB", "predicted", "error"], rows), end="\n\n")
    write_record(make_record(samples), arguments.json)


if __name__ == "__main__":
    main()
