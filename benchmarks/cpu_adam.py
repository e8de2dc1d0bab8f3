"""Compares the parameters that `offload.AdamW` and DeepSpeed's CPU Adam come to, bit by bit.

Both get the same gradients, so that what differs is rounding alone: DeepSpeed's multiplies and adds
in one operation, in another order (csrc/includes/cpu_adam.h, 0.19.8).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import offload
from benchmarks.record import (
    Claim,
    Interval,
    Record,
    add_record_arguments,
    positive,
    table,
    write_record,
)

BETAS = (0.9, 0.95)
ULP = 2.0**-23
"""Of float32, as a part of a number: what one operation rounds by, twice over."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=0)
    parser.add_argument("--params", type=positive, default=10**6, metavar="N", help="(1,000,000)")
    parser.add_argument("--steps", type=positive, default=50, metavar="N", help="(50)")
    return parser.parse_args()


def settings_of(scale: float, decay: float) -> dict[str, Any]:
    """Return AdamW's settings."""
    return {"lr": scale, "betas": BETAS, "eps": 1e-8, "weight_decay": decay}


def parts_of_bound(count: int, steps: int, lr: float, decay: float) -> list[float]:
    """Return after each step the worst difference, as a part of what rounding may come to.

    A step rounds the parameter once, and with a decay once more, on both sides; and an update of
    about `lr`, whose bias corrections DeepSpeed has in fp32 (csrc/includes/cpu_adam.h,
    `update_state`): each with an error of ULP / (1 - beta^t).
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # noqa: PLC0415 - builds for minutes, once

    generator = torch.Generator().manual_seed(0)
    first = torch.randn(count, generator=generator)
    mine, theirs = (torch.nn.Parameter(first.clone()) for _ in range(2))
    ours = offload.AdamW([mine], placement="host", **settings_of(lr, decay))
    stock = DeepSpeedCPUAdam([theirs], adamw_mode=True, **settings_of(lr, decay))
    found, of_update = [], 0.0
    for step in range(1, steps + 1):
        gradient = torch.randn(count, generator=generator) * 10.0 ** (step % 5 - 3)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        stock.step()
        of_update += lr * sum(1 / (1 - beta**step) for beta in BETAS)
        bound = ULP * ((2 if decay else 1) * step * theirs.detach().abs() + of_update)
        found.append(float(((mine - theirs).detach().abs() / bound).max()))
    ours.close()
    return found


def main() -> None:
    """Measure and record; exits with 0 whether the bound holds or not."""
    arguments = parse_arguments()
    found: dict[str, list[float]] = {}
    for lr, decay in ((1e-4, 0.0), (1e-4, 0.1), (1e-2, 0.1)):
        name = f"lr {lr:g}, weight_decay {decay:g}"
        found[name] = parts_of_bound(arguments.params, arguments.steps, lr, decay)
    claims = []
    for name, parts in found.items():
        worst = max(parts)
        interval = Interval(median=worst, low=worst, high=worst, coverage=1.0, count=len(parts))
        claims.append(Claim(name=name, sense="at most", goal=1.0, interval=interval, exact=True))
    record = Record(
        claim="offload.AdamW and DeepSpeed's CPU Adam differ by rounding alone",
        goal="after n steps by 2^-23 * (2n * |param| + lr * sum of 1/(1 - beta^t)) at most",
        claims=claims,
        value=max(claim.interval.median for claim in claims if claim.interval),
        floor=None,
        peers={},
        noise={},
        samples=found,
        settings={"params": arguments.params, "steps": arguments.steps},
        facts={},
    )
    rows = [[name, f"{max(parts):.3f}", f"{parts[-1]:.3f}"] for name, parts in found.items()]
    print(table(["", "worst part of the bound", "after the last step"], rows), end="\n\n")
    write_record(record, arguments.json)


if __name__ == "__main__":
    main()
