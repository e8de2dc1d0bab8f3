"""Updates 100 million parameters on the host: bfloat16 gradients in, bfloat16 parameters out.

Everyone does the same work on arrays of the same sizes, in turns: our update, a pass over the same
bytes without arithmetic, torch's fused AdamW and DeepSpeed's, whose casts into buffers that are
used again count. Ours is compared with torch's to the bit before anything is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import (
    Claim,
    Record,
    add_record_arguments,
    median_interval,
    paired_ratios,
    positive,
    quartiles_text,
    round_order,
    table,
    write_record,
)
from offload.native import AdamSettings, ThreadPool, adam_path, adam_update

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
GOALS = {"floor": 0.97, "torch": 1.6, "deepspeed": 1.5}
"""How many times as fast as that."""
Step = Callable[[], None]


class State:
    """What everyone has for himself."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.grad = torch.randn(count, generator=generator).bfloat16()
        self.master_param = torch.randn(count, generator=generator)
        self.param = self.master_param.bfloat16()
        self.exp_avg = torch.zeros(count)
        self.exp_avg_sq = torch.zeros(count)


def ours(count: int, threads: int) -> tuple[Step, State]:
    """Return our update."""
    state, pool = State(count), ThreadPool(threads)
    settings = AdamSettings(lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY)
    steps = iter(range(1, 1 << 60))

    def step() -> None:
        adam_update(pool, settings, next(steps), **vars(state))

    return step, state


def floor(count: int, threads: int) -> tuple[Step, State]:
    """Return the pass without arithmetic. Raises OSError where there is no compiler."""
    state = State(count)
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    source = Path(__file__).with_name("adam_floor.cpp")
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "floor.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-o", str(library)]
        subprocess.run([compiler, *flags, str(source)], check=True)
        pass_over: Any = ctypes.CDLL(str(library)).pass_over
    arrays = (state.grad, state.master_param, state.exp_avg, state.exp_avg_sq, state.param)
    share = -(-count // threads // 64) * 64
    workers = ThreadPoolExecutor(threads)

    def part(first: int) -> None:
        addresses = [
            ctypes.c_void_p(array.data_ptr() + first * array.element_size()) for array in arrays
        ]
        left = max(0, min(share, count - first))
        pass_over(ctypes.c_uint32(0), *addresses, ctypes.c_size_t(left))

    def step() -> None:
        list(workers.map(part, range(0, count, share)))

    return step, state


def with_casts(state: State, optimizer: torch.optim.Optimizer, master: torch.Tensor) -> Step:
    """Return a step of an optimizer of float32, between the casts that it takes."""
    grad = torch.empty_like(master)
    master.grad = grad

    def step() -> None:
        grad.copy_(state.grad)
        optimizer.step()
        state.param.copy_(master.detach())

    return step


def fused(count: int, threads: int) -> tuple[Step, State]:
    """Return torch's."""
    state = State(count)
    master = torch.nn.Parameter(state.master_param)
    optimizer = torch.optim.AdamW(
        [master], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
    )
    return with_casts(state, optimizer, master), state


def deepspeed(count: int, threads: int) -> tuple[Step, State]:
    """Return DeepSpeed's. Raises ImportError where it is absent."""
    adam: Any = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    state = State(count)
    master = torch.nn.Parameter(state.master_param)
    optimizer = adam([master], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, adamw_mode=True)
    return with_casts(state, optimizer, master), state


ALL = {"ours": ours, "floor": floor, "torch": fused, "deepspeed": deepspeed, "ours again": ours}


def require_same_bits(threads: int) -> None:
    """Raise RuntimeError unless our update and torch's give the same parameters."""
    states = []
    for make in (ours, fused):
        step, state = make(1 << 16, threads)
        for _ in range(3):
            step()
        states.append(state)
    if not torch.equal(states[0].param, states[1].param):
        raise RuntimeError("ours and torch's have different parameters")


def make_record(
    samples: Mapping[str, list[float]], absent: Mapping[str, str], settings: Mapping[str, object]
) -> Record:
    """Put the samples and the claims together."""
    claims = [
        Claim(
            name=f"speed, ours / {peer}",
            sense="at least",
            goal=goal,
            interval=median_interval(paired_ratios(samples[peer], samples["ours"]))
            if peer in samples
            else None,
            reason=absent.get(peer, ""),
        )
        for peer, goal in GOALS.items()
    ]
    medians = {
        peer: claim.interval.median if claim.interval is not None else None
        for peer, claim in zip(GOALS, claims, strict=True)
    }
    again = paired_ratios(samples["ours again"], samples["ours"])
    return Record(
        claim="the update on the host takes as long as its bytes",
        goal="; ".join(f"{claim.name} {claim.sense} {claim.goal}" for claim in claims),
        claims=claims,
        value=medians["floor"],
        floor=medians["floor"],
        peers={peer: medians[peer] for peer in ("torch", "deepspeed")},
        absent=dict(absent),
        noise={"time, ours again / ours": median_interval(again)},
        samples=dict(samples),
        settings=dict(settings),
        facts={"adam_path": adam_path()},
    )


def main() -> None:
    """Measure and record; exits with 0 whether the goal is met or not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=3)
    parser.add_argument("--parameters", type=positive, default=100_000_000, metavar="N")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="(2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    require_same_bits(arguments.threads)
    steps, absent = {}, {}
    for name, make in ALL.items():
        try:
            steps[name] = make(arguments.parameters, arguments.threads)[0]
        except (ImportError, OSError) as error:
            absent[name] = f"{type(error).__name__}: {error}"
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for index in tqdm(range(arguments.warm_up + arguments.pairs), desc="rounds"):
        for name in round_order(list(steps), index):
            begin_s = time.perf_counter()
            steps[name]()
            taken_s = time.perf_counter() - begin_s
            if index >= arguments.warm_up:
                samples[name].append(taken_s)
    rows = [[name, quartiles_text(taken, 4)] for name, taken in samples.items()]
    print(table(["", "seconds"], rows), end="\n\n")
    settings = {"parameters": arguments.parameters, "threads": arguments.threads}
    write_record(make_record(samples, absent, settings), arguments.json)


if __name__ == "__main__":
    main()
