"""Iterations of a model whose optimizer's states do not lie on its GPU, beside DeepSpeed's offload.

Host memory has room for one set of states, so that everyone trains alone, one after the other, and
the first one again at the end. Without a GPU it runs with small sizes, to be tried.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.iterations_worker import OURS, PEERS, Case, open_worker
from benchmarks.record import (
    Claim,
    Interval,
    Record,
    add_record_arguments,
    hidden_by_layers,
    median_interval,
    paired_ratios,
    positive,
    quartiles_text,
    table,
    write_record,
)
from benchmarks.worker import WorkerError, number

SIZES = ((2048, 24), (2560, 32))  # hidden, layers: 1.3 and 2.7 billion parameters
GOALS = {"update_s": 2.2, "iteration_s": 2.5}
"""Times as fast as ZeRO-3 with its optimizer on the host."""
FIRST, AGAIN, RIVAL = "ours", "ours again", "ZeRO-3 offload"
KEYS = ("update_s", "iteration_s", "loss", "peak_device_bytes")


@dataclass
class Measured:
    """What one case took everyone that could be had."""

    case: Case
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Of every step, those of the warm-up included."""
    absent: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Mapping[str, object]] = field(default_factory=dict)

    def speedup(self, mode: str, key: str) -> Interval | None:
        """Return how many times as long `mode` takes as ours; None where it could not be had."""
        if mode not in self.samples or FIRST not in self.samples:
            return None
        return median_interval(paired_ratios(self.samples[mode][key], self.samples[FIRST][key]))

    def others(self) -> int | None:
        """Return how many of ours have losses or parameters that differ in a bit from the first.

        None where one that was asked for is absent, or there is nothing to compare.
        """
        names = [mode for mode in (*OURS, AGAIN) if mode in self.losses or mode in self.absent]
        if len(names) < 2 or any(mode in self.absent for mode in names):
            return None
        ours = [(self.losses[mode], self.facts[mode]["digest"]) for mode in names]
        return sum(each != ours[0] for each in ours)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=3)
    known = (*OURS, *PEERS)
    parser.add_argument(
        "--sizes", nargs="+", type=hidden_by_layers, default=SIZES, metavar="HIDDENxLAYERS"
    )
    parser.add_argument("--modes", nargs="+", choices=known, default=known, metavar="MODE")
    for flag, default in (("--seq-len", 2048), ("--micro-batch", 1), ("--vocab", 32768)):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"({default})")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(cuda)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; try --device cpu with small --sizes")
    return arguments


def measure(case: Case, modes: list[str], arguments: argparse.Namespace) -> Measured:
    """Let everyone that can be had train `case`, each in a process of its own."""
    found = Measured(case)
    again = [AGAIN] if FIRST in modes else []
    for mode in tqdm([*modes, *again], desc=case.name):
        try:
            with open_worker(FIRST if mode == AGAIN else mode, case) as worker:
                samples: dict[str, list[float]] = {key: [] for key in KEYS}
                for _ in range(arguments.warm_up + arguments.pairs):
                    answer = worker.ask("step")
                    for key in KEYS:
                        samples[key].append(number(answer, key))
                found.facts[mode] = {**worker.facts, **worker.ask("outcome")}
        except WorkerError as error:
            found.absent[mode] = str(error)
            continue
        found.losses[mode] = samples.pop("loss")
        found.samples[mode] = {key: each[arguments.warm_up :] for key, each in samples.items()}
    return found


def claims_of(found: Measured) -> list[Claim]:
    """Return what is claimed of one case."""
    name = found.case.name
    claims = [
        Claim(
            name=f"{name}: {key.removesuffix('_s')}, {RIVAL} / ours",
            sense="at least",
            goal=goal,
            interval=found.speedup(RIVAL, key),
            reason=found.absent.get(RIVAL, found.absent.get(FIRST, "not asked for")),
        )
        for key, goal in GOALS.items()
    ]
    others = found.others()
    exactly = None
    if others is not None:
        exactly = Interval(median=others, low=others, high=others, coverage=1.0, count=1)
    claims.append(
        Claim(
            name=f"{name}: placements with other bits",
            sense="at most",
            goal=0,
            interval=exactly,
            reason="a placement is absent" if others is None else "",
            exact=True,
        )
    )
    return claims


def make_record(results: list[Measured], arguments: argparse.Namespace) -> Record:
    """Put the samples, the claims and the ratios together."""
    claims = [claim for found in results for claim in claims_of(found)]
    ratios = {
        f"{found.case.name}: {key.removesuffix('_s')}, {mode} / ours": speedup
        for found in results
        for mode in found.samples
        for key in GOALS
        if (speedup := found.speedup(mode, key)) is not None
    }
    timed = [claim.interval.median for claim in claims if claim.interval and not claim.exact]
    return Record(
        claim="a model trains faster with its states on the host than with ZeRO-3's offload",
        goal=f"update >= {GOALS['update_s']}x, iteration >= {GOALS['iteration_s']}x, same bits",
        claims=claims,
        value=min(timed, default=None),
        floor=None,
        peers={name: each.median for name, each in ratios.items() if AGAIN not in name},
        noise={name: each for name, each in ratios.items() if AGAIN in name},
        samples={
            found.case.name: {"steps": found.samples, "losses": found.losses} for found in results
        },
        settings={key: value for key, value in vars(arguments).items() if key != "json"},
        absent={
            f"{found.case.name}, {mode}": why
            for found in results
            for mode, why in found.absent.items()
        },
        facts={found.case.name: found.facts for found in results},
    )


def case_table(found: Measured) -> str:
    """Return everyone's update, iteration and peak."""
    rows = []
    for mode, figures in found.samples.items():
        cells = [quartiles_text([1e3 * each_s for each_s in figures[key]], 1) for key in GOALS]
        peak = statistics.median(figures["peak_device_bytes"]) / 2**30
        chosen = found.facts[mode].get("shares")
        rows.append([mode, *cells, f"{peak:.2f}", "" if chosen is None else str(chosen)])
    head = [found.case.name, "update ms", "iteration ms", "peak GiB", "updated where"]
    return table(head, rows)


def main() -> None:
    """Measure and record; exits with 0 whether the goals are met or not."""
    arguments = parse_arguments()
    results = []
    for hidden, layers in arguments.sizes:
        case = Case(
            hidden=hidden,
            layers=layers,
            seq_len=arguments.seq_len,
            micro_batch=arguments.micro_batch,
            vocab=arguments.vocab,
            device=arguments.device,
        )
        results.append(measure(case, list(arguments.modes), arguments))
        print(case_table(results[-1]), end="\n\n", flush=True)
    write_record(make_record(results, arguments), arguments.json)


if __name__ == "__main__":
    main()
