"""What a saved tensor costs in Python: our hooks against an identity hook, copying and I/O aside.

A chain of cheap operators saves one small tensor each. Cost is the time of a turn with a hook and
of the turn after it, without, less that of the turns without on both sides, a saved tensor;
discarded I/O completes at once, so what remains is bookkeeping.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import offload
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
from benchmarks.spill_directory import add_path_argument, spill_directory
from offload.native import FaultPlan

GOALS = {"passed through": 6.0, "offloaded": 25.0}
LINEAR_GOAL = 1.2
# Chains take several turns a round, short ones more, and the median turn counts: a difference of
# two timings needs both of them free of whatever else the machine did.
ROUND_TENSORS = 100_000
MIN_TURNS, MAX_TURNS = 3, 10

Hooks = Callable[[], AbstractContextManager[Any]]
# Of a mode and a length of the chain: seconds a saved tensor, for hooks those above no hook.
Samples = dict[str, dict[int, list[float]]]


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=3)
    add_path_argument(parser)
    parser.add_argument("--tensor-bytes", type=positive, default=256, help="of each (256)")
    parser.add_argument(
        "--tensors",
        type=positive,
        nargs="+",
        default=[1_000, 10_000, 100_000],
        metavar="N",
        help="lengths of the chain (1000 10000 100000)",
    )
    return parser.parse_args(), parser


def chain(start: torch.Tensor, length: int) -> torch.Tensor:
    """Apply `length` operators that save their input and take as long whatever is in it."""
    out = start * 1.0  # a leaf would count as a parameter
    for _ in range(length):
        out = F.leaky_relu(out)
    return out


def seconds_a_tensor(hooks: Hooks, start: torch.Tensor, length: int) -> float:
    """Run forward and backward of a chain and return the seconds for each saved tensor."""
    gradient = torch.ones_like(start)
    begin = time.perf_counter()
    with hooks():
        out = chain(start, length)
    torch.autograd.backward(out, gradient)
    return (time.perf_counter() - begin) / length


def saved_tensors(start: torch.Tensor, length: int) -> int:
    """Count what autograd really saves of a chain."""
    count = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        chain(start, length)
    return count


def identity() -> AbstractContextManager[Any]:
    """Return the cheapest hooks there are: what PyTorch itself charges for having any."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def open_modes(
    directory: str, tensor_bytes: int, stack: ExitStack
) -> tuple[offload.ActivationOffload, offload.ActivationOffload]:
    """Open what passes every tensor of the chain through, and what offloads every one."""
    small = offload.ActivationOffload(path=directory, min_tensor_bytes=tensor_bytes + 1)
    spilled = offload.ActivationOffload(
        path=directory,
        min_tensor_bytes=0,
        verify=False,
        schedule="all",
        io_engine=FaultPlan(discard=True),
    )
    return stack.enter_context(small), stack.enter_context(spilled)


def prove(
    small: offload.ActivationOffload,
    spilled: offload.ActivationOffload,
    start: torch.Tensor,
    length: int,
) -> None:
    """Raise RuntimeError unless both treat every saved tensor of a chain as they should."""
    if (count := saved_tensors(start, length)) != length:
        raise RuntimeError(f"a chain of {length} operators saves {count} tensors")
    for act in (small, spilled):
        seconds_a_tensor(act.forward, start, length)
    expected = length * start.nbytes
    passed = small.stats().passed_through_bytes.get("small", 0)
    offloaded = spilled.stats().offloaded_bytes
    if (passed, offloaded) != (expected, expected):
        raise RuntimeError(f"{passed} bytes passed, {offloaded} offloaded, not {expected} each")


def measure(
    modes: Mapping[str, Hooks], start: torch.Tensor, arguments: argparse.Namespace
) -> Samples:
    """Let all modes take turns at every length, each between turns without a hook."""
    names = ("none", *modes, "none again")
    samples: Samples = {name: {length: [] for length in arguments.tensors} for name in names}
    for index in tqdm(range(arguments.warm_up + arguments.pairs), desc="rounds"):
        for length in arguments.tensors:
            turns: dict[str, list[float]] = {name: [] for name in names}
            gc.collect()  # everyone begins with the same heap
            for turn in range(min(MAX_TURNS, max(MIN_TURNS, ROUND_TENSORS // length))):
                before_s = seconds_a_tensor(nullcontext, start, length)
                turns["none"].append(before_s)
                for name in round_order(list(modes), index + turn):
                    hooked_s = seconds_a_tensor(modes[name], start, length)
                    # Caches that are cold after our hooks are our cost, not a discount on what
                    # comes next: the turn that follows is theirs as well.
                    behind_s = seconds_a_tensor(nullcontext, start, length)
                    # The machine's speed drifts: only what stands side by side is compared.
                    after_s = seconds_a_tensor(nullcontext, start, length)
                    turns[name].append(hooked_s + behind_s - before_s - after_s)
                    before_s = after_s
                turns["none again"].append(before_s)
            if index >= arguments.warm_up:
                for name, taken_s in turns.items():
                    samples[name][length].append(statistics.median(taken_s))
    return samples


def ratios_to_identity(samples: Samples, name: str, length: int) -> list[float]:
    """Return a mode's cost over the identity hook's, round by round."""
    once, again = (samples[who][length] for who in ("identity", "identity again"))
    # Both identities of a round together: a difference of two timings is noisy alone. Where the
    # noise is larger than the hook's cost still, the round must not speak for us.
    both = [(one_s + other_s) / 2 for one_s, other_s in zip(once, again, strict=True)]
    return [
        cost_s / identity_s if identity_s > 0 else math.inf
        for cost_s, identity_s in zip(samples[name][length], both, strict=True)
    ]


def make_record(samples: Samples, arguments: argparse.Namespace) -> Record:
    """Put the samples, the claims and the ratios together."""
    shortest, longest = min(arguments.tensors), max(arguments.tensors)
    claims = []
    for name, goal in GOALS.items():
        for length in arguments.tensors:
            ratios = ratios_to_identity(samples, name, length)
            claims.append(at_most(goal, f"{name} / identity, {length} tensors", ratios))
    for name in GOALS:
        # Against identity, since the operators' own memory costs more a byte once it is large.
        growth = paired_growth(samples, name, shortest, longest)
        claims.append(
            at_most(LINEAR_GOAL, f"{name} / identity, {longest} / {shortest} tensors", growth)
        )
    noise = {}
    for length in arguments.tensors:
        twice = paired_ratios(samples["none again"][length], samples["none"][length])
        noise[f"none again / none, time, {length}"] = median_interval(twice)
    worst = {
        name: max(
            statistics.median(ratios_to_identity(samples, name, length))
            for length in arguments.tensors
        )
        for name in GOALS
    }
    return Record(
        claim="hooks cost little more than PyTorch charges for having any",
        goal=(
            f"<= {GOALS['passed through']:g}x an identity hook for a tensor passed through, "
            f"<= {GOALS['offloaded']:g}x for one offloaded; linear to {longest} tensors"
        ),
        claims=claims,
        value=worst["offloaded"],
        floor=worst["offloaded"],
        peers={f"identity hook, {name}": ratio for name, ratio in worst.items()},
        noise=noise,
        samples={name: {str(n): s for n, s in by.items()} for name, by in samples.items()},
        settings={
            "tensors": arguments.tensors,
            "tensor_bytes": arguments.tensor_bytes,
            "threads": torch.get_num_threads(),
        },
    )


def at_most(goal: float, name: str, ratios: Sequence[float]) -> Claim:
    """Return the claim that the median of `ratios` is at most `goal`."""
    return Claim(name=name, sense="at most", goal=goal, interval=median_interval(ratios))


def paired_growth(samples: Samples, name: str, shortest: int, longest: int) -> list[float]:
    """Return a mode's ratio to identity in the longest chain over that in the shortest."""
    few, many = (ratios_to_identity(samples, name, length) for length in (shortest, longest))
    return [
        long / short if 0 < short < math.inf else math.inf
        for long, short in zip(many, few, strict=True)
    ]


def cost_table(samples: Samples, lengths: Sequence[int]) -> str:
    """Return the cost of every mode in microseconds: medians, quartiles beside them."""
    rows = []
    for name in ("identity", "identity again", *GOALS):
        costs = [[1e6 * cost_s for cost_s in samples[name][n]] for n in lengths]
        rows.append([name, *map(quartiles_text, costs), ""])
    return table(["us a tensor above no hook", *map(str, lengths), ""], rows)


def main() -> None:
    """Measure and record; exits with 0 whether the goal is met or not."""
    arguments, parser = parse_arguments()
    torch.set_num_threads(1)
    start = torch.ones(max(1, arguments.tensor_bytes // 4), requires_grad=True)
    with ExitStack() as stack:
        directory = stack.enter_context(spill_directory(arguments.path, parser))
        small, spilled = open_modes(directory, start.nbytes, stack)
        prove(small, spilled, start, min(arguments.tensors))
        modes: dict[str, Hooks] = {
            "identity": identity,
            "passed through": small.forward,
            "offloaded": spilled.forward,
            "identity again": identity,
        }
        samples = measure(modes, start, arguments)
    print(cost_table(samples, arguments.tensors), end="\n\n")
    write_record(make_record(samples, arguments), arguments.json)


if __name__ == "__main__":
    main()
