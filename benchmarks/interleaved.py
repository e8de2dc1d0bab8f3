"""Updates beside an emulated device as they were planned, against what the schedule said of them.

The device, its link and its host have the proportions of an H100's machine, slowed down, with a
jitter on every task; the planner knows none of that and measures. That all schedules give the same
bits is tested elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
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
from offload.device.emulated_updates import EmulatedRates, EmulatedUpdates
from perfmodel.schedules.updates import UpdateRates, simulate_updates

# Of the H100 machine of the published sweeps, as benchmarks/published_sweeps.py fits them; the
# device's own arithmetic is never what takes the time.
H100 = {
    "device_params_per_s": 25e9,
    "host_params_per_s": 2.56e9,
    "to_device_bytes_per_s": 46.2e9,
    "to_host_bytes_per_s": 46.2e9,
}
MODES = {
    "planned": "auto",
    "stride 2": "stride=2",
    "all on the host": "host",
    "planned again": "auto",
}
ERROR_GOAL = 0.05
GAIN_GOAL = 1.0

Samples = dict[str, list[float]]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=2)
    parser.add_argument("--subgroups", type=positive, default=48, metavar="N", help="(48)")
    parser.add_argument("--subgroup-params", type=positive, default=100_000, help="(100000)")
    parser.add_argument("--slower", type=float, default=500.0, help="than an H100 (500)")
    parser.add_argument("--jitter", type=float, default=0.1, help="largest part of a task (0.1)")
    return parser.parse_args()


class Updated:
    """An optimizer beside a device of its own."""

    def __init__(self, schedule: str, seed: int, arguments: argparse.Namespace) -> None:
        rates = {name: rate / arguments.slower for name, rate in H100.items()}
        self.device = EmulatedUpdates(EmulatedRates(**rates, jitter=arguments.jitter, seed=seed))
        generator = torch.Generator().manual_seed(0)
        size = arguments.subgroup_params
        params = [
            torch.nn.Parameter(torch.randn(size, generator=generator).bfloat16())
            for _ in range(arguments.subgroups)
        ]
        for param in params:
            param.grad = torch.randn(size, generator=generator).bfloat16()
        self.optimizer = offload.AdamW(
            params,
            subgroup_params=size,
            threads=1,
            update_schedule=schedule,
            emulated_device=self.device,
        )

    def step_s(self) -> float:
        """Return how long one step takes."""
        begin_s = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - begin_s

    def close(self) -> None:
        """Give the memory back."""
        self.optimizer.close()
        self.device.close()


def predicted_s(updated: Updated) -> tuple[float, UpdateRates]:
    """Return what the schedule says of a step by the rates that were measured, and those."""
    side = updated.optimizer.device_side
    if side is None or side.schedule is None or side.rates is None:
        raise RuntimeError("nothing was planned")
    return simulate_updates(side.schedule, side.rates).duration_s, side.rates


def make_record(
    samples: Samples,
    predictions: Mapping[str, float],
    facts: Mapping[str, object],
    settings: Mapping[str, object],
) -> Record:
    """Put the samples and the claims together."""
    expected_s = predictions["planned"]
    error = median_interval([step_s / expected_s for step_s in samples["planned"]])
    gain = median_interval(paired_ratios(samples["stride 2"], samples["planned"]))
    claims = [
        Claim(
            name="step time / the schedule's prediction",
            sense="at most",
            goal=1 + ERROR_GOAL,
            interval=error,
        ),
        Claim(
            name="step time / the schedule's prediction, no less",
            sense="at least",
            goal=1 - ERROR_GOAL,
            interval=error,
        ),
        Claim(name="speed / stride 2", sense="at least", goal=GAIN_GOAL, interval=gain),
    ]
    return Record(
        claim="an interleaved update takes as long as its schedule says",
        goal="; ".join(f"{claim.name} {claim.sense} {claim.goal}" for claim in claims),
        claims=claims,
        value=error.median,
        floor=error.median,
        peers={
            name: median_interval(paired_ratios(seconds, samples["planned"])).median
            for name, seconds in samples.items()
            if not name.startswith("planned")
        },
        noise={
            "step time, planned again / planned": median_interval(
                paired_ratios(samples["planned again"], samples["planned"])
            )
        },
        samples=samples,
        settings=dict(settings),
        absent={},
        facts=facts,
    )


def main() -> None:
    """Measure and record; exits with 0 whether the goals are met or not."""
    arguments = parse_arguments()
    updated = {
        name: Updated(schedule, seed, arguments)
        for seed, (name, schedule) in enumerate(MODES.items())
    }
    samples: Samples = {name: [] for name in updated}
    for index in tqdm(range(arguments.warm_up + arguments.pairs), desc="rounds"):
        for name in round_order(list(updated), index):
            step_s = updated[name].step_s()
            if index >= arguments.warm_up:
                samples[name].append(step_s)
    predictions, facts = {}, {}
    for name in ("planned", "planned again"):
        predictions[name], rates = predicted_s(updated[name])
        side = updated[name].optimizer.device_side
        assert side is not None
        assert side.schedule is not None
        facts[name] = {
            "predicted_s": predictions[name],
            "moved": side.schedule.share("moved"),
            "measured": asdict(rates),
        }
    for each in updated.values():
        each.close()
    rows = [[name, quartiles_text(seconds, 4)] for name, seconds in samples.items()]
    print(table(["", "s a step"], rows))
    print(f"predicted: {predictions['planned']:.4f} s", end="\n\n")
    settings = {key: value for key, value in vars(arguments).items() if key not in ("json",)}
    write_record(make_record(samples, predictions, facts, settings), arguments.json)


if __name__ == "__main__":
    main()
