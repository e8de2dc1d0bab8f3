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
from dataclasses import asdict, dataclass
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
from perfmodel.schedules.updates import STATE_BYTES, UpdateRates, simulate_updates

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
LINK_GOAL = 0.95
# The queues of each direction that the schedule has.
LINKS = {"to the device": ("states in", "parameters"), "to the host": ("states out",)}

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
        self._params = [
            torch.nn.Parameter(torch.randn(size, generator=generator).bfloat16())
            for _ in range(arguments.subgroups)
        ]
        self._grads = [torch.randn(size, generator=generator).bfloat16() for _ in self._params]
        self.rates: dict[str, float] = {}
        self.optimizer = offload.AdamW(
            self._params,
            subgroup_params=size,
            threads=1,
            update_schedule=schedule,
            emulated_device=self.device,
        )

    def step_s(self) -> float:
        """Return how long one step takes; `rates` has what each direction carried in it a second.

        Gradients are of the backward before, and on their way to the host when that ends.
        """
        before = self._carried()
        begin_s = time.perf_counter()
        self.optimizer.step()
        step_s = time.perf_counter() - begin_s
        after = self._carried()
        self.rates = {name: (after[name] - before[name]) / step_s for name in LINKS}
        return step_s

    def backward(self) -> None:
        """Have the gradients leave, as a backward does, and wait until they have."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self._params, self._grads)
        last = torch.zeros(2, 1)  # behind all of them
        self.device.copy("gradients", last[0], last[1], ()).synchronize()

    def _carried(self) -> dict[str, float]:
        done = self.device.done()
        return {name: sum(done[queue][0] for queue in queues) for name, queues in LINKS.items()}

    def close(self) -> None:
        """Give the memory back."""
        self.optimizer.close()
        self.device.close()


@dataclass(frozen=True)
class Prediction:
    """What the schedule says of a step, by the rates that were measured."""

    step_s: float
    link_rates: dict[str, float]
    """Bytes a second that each direction carries, over the whole step."""
    rates: UpdateRates


def predicted(updated: Updated) -> Prediction:
    """Return what the schedule says. Raises RuntimeError where nothing was planned."""
    side = updated.optimizer.device_side
    if side is None or side.schedule is None or side.rates is None:
        raise RuntimeError("nothing was planned")
    schedule, rates = side.schedule, side.rates
    step_s = simulate_updates(schedule, rates).duration_s
    params = sum(schedule.sizes)
    moved = STATE_BYTES * params * schedule.share("moved")
    returned = rates.param_bytes * params * schedule.share("host")
    carried = {"to the device": moved + returned, "to the host": moved}
    return Prediction(step_s, {name: nbytes / step_s for name, nbytes in carried.items()}, rates)


def claims_of(
    samples: Samples, carried: Mapping[str, list[float]], prediction: Prediction
) -> list[Claim]:
    """Return what is claimed of the planned schedule; `carried`: what each direction did a step."""
    error = median_interval([step_s / prediction.step_s for step_s in samples["planned"]])
    gain = median_interval(paired_ratios(samples["stride 2"], samples["planned"]))
    return [
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
        *(
            Claim(
                name=f"bytes a second {name} / the schedule's",
                sense="at least",
                goal=LINK_GOAL,
                interval=median_interval([rate / prediction.link_rates[name] for rate in rates]),
            )
            for name, rates in carried.items()
        ),
    ]


def make_record(
    samples: Samples,
    claims: list[Claim],
    facts: Mapping[str, object],
    settings: Mapping[str, object],
) -> Record:
    """Put the samples and the claims together."""
    value = claims[0].interval.median if claims[0].interval is not None else None
    return Record(
        claim="an interleaved update takes as long as its schedule says",
        goal="; ".join(f"{claim.name} {claim.sense} {claim.goal}" for claim in claims),
        claims=claims,
        value=value,
        floor=value,
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
    carried: dict[str, list[float]] = {name: [] for name in LINKS}
    for index in tqdm(range(arguments.warm_up + arguments.pairs), desc="rounds"):
        for name in round_order(list(updated), index):
            updated[name].backward()
            step_s = updated[name].step_s()
            if index >= arguments.warm_up:
                samples[name].append(step_s)
                for way, rate in updated[name].rates.items() if name == "planned" else ():
                    carried[way].append(rate)
    facts = {}
    for name in ("planned", "planned again"):
        prediction = predicted(updated[name])
        side = updated[name].optimizer.device_side
        assert side is not None
        assert side.schedule is not None
        facts[name] = {**asdict(prediction), "moved": side.schedule.share("moved")}
    prediction = predicted(updated["planned"])
    for each in updated.values():
        each.close()
    rows = [[name, quartiles_text(seconds, 4)] for name, seconds in samples.items()]
    print(table(["", "s a step"], rows))
    print(f"predicted: {prediction.step_s:.4f} s", end="\n\n")
    settings = {key: value for key, value in vars(arguments).items() if key not in ("json",)}
    claims = claims_of(samples, carried, prediction)
    write_record(make_record(samples, claims, facts, settings), arguments.json)


if __name__ == "__main__":
    main()
