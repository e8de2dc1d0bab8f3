"""Times `perfmodel plan`, start and all, and a search through a hundred thousand strategies.

A plan is asked for in a process of its own each time, as its users do: models that fit at once,
that fit only where something leaves, and that do not fit. The many strategies are those of one
model on eight devices, in every stage of ZeRO, several pipelines, micro-batches and fine shares.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import (
    ROOT,
    Claim,
    Record,
    add_record_arguments,
    median_interval,
    positive,
    write_record,
)
from perfmodel.commands.plan import NOTHING_FITS
from perfmodel.known_models import read_known_model
from perfmodel.machine import read_machine
from perfmodel.planner import Found, Search, plan
from perfmodel.workload import Parallel, Workload

PLAN_GOAL_S = 1.0
SEARCH_GOAL_S = 20.0
FEWEST_TRIED = 100_000
CASES = (
    ("gpt2", "laptop", 1024, 8),
    ("bert-large", "rtx-4090", 512, 16),
    ("gpt2-xl", "rtx-4090", 2048, 4),
    ("t5-large", "laptop", 512, 4),
    ("t5-large", "h100-sxm", 2048, 8),
    ("llama-3-8b", "a100-80gb-sxm", 4096, 4),
    ("gemma-2-9b", "h100-sxm", 2048, 8),
    ("mixtral-8x7b", "gh200", 4096, 1),
    ("llama-3-70b", "h100-sxm", 4096, 1),
    ("opt-6.7b", "a100-40gb-sxm", 4096, 16),
    ("t5-large", "l40s", 2048, 16),
    ("qwen2.5-7b", "rtx-4090", 4096, 8),
)
"""Models and machines by name, positions of a sequence, and sequences of a micro-batch."""
MODEL, MACHINE, DEVICES = "llama-3-8b", "a100-80gb-sxm", 8
SEARCHED = Workload(
    model=read_known_model(MODEL),
    seq_len=4096,
    micro_batch=16,
    parallel=Parallel(data=DEVICES),
    framework="deepspeed",
)


def planned(case: tuple[str, str, int, int]) -> tuple[float, float, bool]:
    """Run `perfmodel plan`; return its seconds on the clock and the processor, and what fits.

    Raises RuntimeError where it ends with anything but a plan, or none.
    """
    model, machine, seq_len, micro_batch = case
    command = [sys.executable, "-m", "perfmodel", "plan", "--model", model, "--machine", machine]
    command += ["--seq-len", f"{seq_len}", "--micro-batch", f"{micro_batch}"]
    before, begin_s = os.times(), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    taken_s, after = time.perf_counter() - begin_s, os.times()
    if done.returncode not in (0, NOTHING_FITS):
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}: {done.stderr}")
    user_s = after.children_user - before.children_user
    system_s = after.children_system - before.children_system
    return taken_s, user_s + system_s, done.returncode == 0


def searched(fine: int) -> tuple[float, Found]:
    """Go through the strategies; return the seconds and what came of it."""
    search = Search(
        zero_stages=(0, 1, 2, 3), pipelines=(1, 2, 4), micro_batches=(1, 2, 4, 8, 16), fine=fine
    )
    begin_s = time.perf_counter()
    found = plan(SEARCHED, read_machine(MACHINE), None, search)
    return time.perf_counter() - begin_s, found


def imports_torch() -> bool:
    """Say whether a plan loads torch. Raises RuntimeError where there is no plan."""
    code = (
        "import sys; from perfmodel.cli import main; "
        "words = 'plan --model gpt2 --machine laptop --seq-len 64 --micro-batch 1'; "
        "sys.exit(2 if main(words.split()) else 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"a plan ended with {done.returncode}: {done.stderr!r}")
    return done.returncode == 1


def main() -> None:
    """Measure and record; exits with 0 whether the goals are met or not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=1)
    parser.add_argument("--cases", type=positive, default=len(CASES), metavar="N", help="(all)")
    parser.add_argument("--fine", type=positive, default=128, metavar="N", help="(128)")
    arguments = parser.parse_args()
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    fitting: dict[str, bool] = {}
    many: list[float] = []
    tried = 0
    for index in tqdm(range(arguments.warm_up + arguments.pairs), desc="rounds"):
        for case in CASES[: arguments.cases]:
            name = "{} on {}, {} x {}".format(*case)
            taken_s, processor_s, fits = planned(case)
            if index >= arguments.warm_up:
                wall.setdefault(name, []).append(taken_s)
                processor.setdefault(name, []).append(processor_s)
                fitting[name] = fits
        taken_s, found = searched(arguments.fine)
        if index >= arguments.warm_up:
            many.append(taken_s)
            tried = found.tried
    claims = [
        Claim(
            name=f"seconds, {name}",
            sense="at most",
            goal=PLAN_GOAL_S,
            interval=median_interval(taken),
        )
        for name, taken in wall.items()
    ]
    slowest = max(claim.interval.median for claim in claims if claim.interval is not None)
    claims += _claims_of_many(tried, many)
    record = Record(
        claim="a plan takes a second, and a hundred thousand strategies twenty",
        goal=f"<= {PLAN_GOAL_S} s, and <= {SEARCH_GOAL_S} s for >= {FEWEST_TRIED}",
        claims=claims,
        value=slowest,
        floor=None,
        peers={},
        noise={},
        samples={"wall_s": wall, "processor_s": processor, "many_s": many},
        settings={"cases": arguments.cases, "fine": arguments.fine},
        facts={"fits": fitting, "tried": tried, "imports_torch": imports_torch()},
    )
    write_record(record, arguments.json)


def _claims_of_many(tried: int, taken: list[float]) -> list[Claim]:
    return [
        Claim(
            name="strategies tried",
            sense="at least",
            goal=FEWEST_TRIED,
            interval=median_interval([tried]),
            exact=True,
        ),
        Claim(
            name="seconds, all of them",
            sense="at most",
            goal=SEARCH_GOAL_S,
            interval=median_interval(taken),
        ),
    ]


if __name__ == "__main__":
    main()
