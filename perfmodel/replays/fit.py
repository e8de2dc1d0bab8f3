"""What is not published of Deep Optimizer States' machines, fitted to its smallest model's rows.

Four rates of the updates come from the 7-billion model at seven strides, two costs of the rest of
an iteration from its iterations. The larger models' rows are for comparison only.

What is missed is one thing: ZeRO-3 with 5120 channels (13 and 20 billion) takes up to 13 % longer
than said. There a flush for which the step waits costs about 0.8 ns a parameter, with 3072 and 4096
channels 0.6 to 0.7. It may be that temporary memory above malloc's largest threshold, 32 MiB, is
mapped afresh for each gradient; rows of one model cannot tell, so that nothing here does either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from perfmodel.machine import Link, Machine, read_machine
from perfmodel.replays.deep_optimizer_states import (
    BY_STRIDE,
    FITTED_MODEL,
    ITERATIONS,
    NUM_GPUS,
    SEQ_LEN,
    SHAPES,
    STRIDES,
    IterationRow,
    sizes_of,
)
from perfmodel.schedules.updates import UpdateRates, simulate_updates, stride_schedule
from perfmodel.workload import Parallel, Workload
from perfmodel.zero_offload import FlushCosts, Iteration, simulate_iteration

__all__ = [
    "EVENLY",
    "FITS",
    "IterationFit",
    "UpdateFit",
    "descended",
    "fitted_iterations",
    "fitted_updates",
    "iterations_badness",
    "updates_badness",
]

MACHINES = {"H100": "dos-h100", "A100": "a100-40gb-sxm"}
# Fused updates on the device are bound by its memory: 28 bytes a parameter at some 2 TB/s.
DEVICE_PARAMS_PER_S = 7e10
EVENLY = 0.5
"""Which part of what an iteration takes beside is a matter of its layers. Rows of one model cannot
say: evenly, for want of a reason."""


@dataclass(frozen=True)
class UpdateFit:
    """What is not published, of each GPU's share of a machine."""

    machine: str
    plain_params_per_s: float
    """Updated on the host where nothing moves: parameters are rounded and sent after it."""
    host_params_per_s: float
    """Updated on the host while that goes on beside it, as the original does when others move."""
    link_bytes_per_s: float
    subgroup_s: float

    def rates(self, stride: int) -> UpdateRates:
        """Return the machine; the original has one queue for both directions of the states."""
        return UpdateRates(
            device_params_per_s=DEVICE_PARAMS_PER_S,
            host_params_per_s=self.host_params_per_s if stride else self.plain_params_per_s,
            to_device_bytes_per_s=self.link_bytes_per_s,
            to_host_bytes_per_s=self.link_bytes_per_s,
            subgroup_s=self.subgroup_s,
        )

    def predict(self, model: str, stride: int, resident: float = 0.0) -> float:
        """Return the node's update throughput, as it is published: by the model's name."""
        shape = SHAPES[self.machine][model]
        schedule = stride_schedule(sizes_of(shape), stride, resident=resident)
        return shape.named / simulate_updates(schedule, self.rates(stride)).duration_s / 1e9


def updates_badness(machine: str, values: Sequence[float]) -> float:
    """Return how far `UpdateFit`'s four rates are from the 7-billion model's row."""
    fit = UpdateFit(machine, *values)
    predicted = [fit.predict(FITTED_MODEL, stride) for stride in STRIDES]
    return _squares(predicted, BY_STRIDE[machine][FITTED_MODEL])


def fitted_updates(machine: str) -> UpdateFit:
    """Return the rates with which the 7-billion model's row comes out best."""
    badness = partial(updates_badness, machine)
    start = BY_STRIDE[machine][FITTED_MODEL][0] / NUM_GPUS * 1e9
    ends = [
        descended(badness, [start, 1.3 * start, link_bytes_per_s, 1e-3])
        for link_bytes_per_s in (1.5e10, 4e10)  # one valley's bottom is not the other's
    ]
    return UpdateFit(machine, *min(ends, key=badness))


def descended(badness: Callable[[Sequence[float]], float], start: Sequence[float]) -> list[float]:
    """Return positive numbers near `start` at which `badness` is least, one at a time."""
    found, best, step = list(start), badness(start), 0.3
    while step > 2e-3:
        improved = False
        for place in range(len(found)):
            for factor in (1 + step, 1 / (1 + step)):
                tried = [*found]
                tried[place] *= factor
                if (now := badness(tried)) < best:
                    found, best, improved = tried, now, True
        step = step if improved else step / 2
    return found


def _squares(predicted: Sequence[float], published: Sequence[float]) -> float:
    return sum(math.log(one / other) ** 2 for one, other in zip(predicted, published, strict=True))


@dataclass(frozen=True)
class IterationFit:
    """What an iteration takes besides computing, the network and updates."""

    updates: UpdateFit
    converted_params_per_s: float
    """As `FlushCosts`."""
    beside_s: float
    """Of the 7-billion model: what `FlushCosts` has for each step and for its layers."""
    of_layers: float = EVENLY
    """The part of that which layers take, so that a model with more has more of it."""

    @property
    def costs(self) -> FlushCosts:
        """Both, as the model wants them."""
        layers = SHAPES[self.updates.machine][FITTED_MODEL].layers
        return FlushCosts(
            converted_params_per_s=self.converted_params_per_s,
            step_s=(1 - self.of_layers) * self.beside_s,
            layer_s=self.of_layers * self.beside_s / layers,
        )

    def predict(self, row: IterationRow) -> Iteration:
        """Return what one of `ITERATIONS` takes."""
        shape = SHAPES[row.machine][row.model]
        workload = Workload(
            model=shape.model,
            seq_len=SEQ_LEN,
            micro_batch=row.micro_batch,
            parallel=Parallel(data=NUM_GPUS, zero_stage=3),
            framework="deepspeed",
        )
        return simulate_iteration(
            workload,
            _machine_of(self.updates),
            stride_schedule(sizes_of(shape), row.stride, resident=row.resident),
            self.updates.rates(row.stride),
            self.costs,
            blocking=row.blocking,
        )


def _machine_of(updates: UpdateFit) -> Machine:
    rate = updates.link_bytes_per_s
    link = Link(to_host_bytes_per_s=rate, to_device_bytes_per_s=rate, both_bytes_per_s=2 * rate)
    return replace(read_machine(MACHINES[updates.machine]), devices=NUM_GPUS, link=link)


def iterations_badness(updates: UpdateFit, values: Sequence[float]) -> float:
    """Return how far `IterationFit`'s two costs are from the 7-billion model's iterations."""
    fit = IterationFit(updates, *values)
    rows = [row for row in ITERATIONS if row.fitted and row.machine == updates.machine]
    predicted = [fit.predict(row).iteration_s for row in rows]
    return _squares(predicted, [row.seconds for row in rows])


def fitted_iterations(updates: UpdateFit) -> IterationFit:
    """Return the costs with which the 7-billion model's iterations come out best."""
    rate = SHAPES[updates.machine][FITTED_MODEL].params / NUM_GPUS  # a second each, to begin with
    badness = partial(iterations_badness, updates)
    return IterationFit(updates, *descended(badness, [rate, 1.0]))


# What both functions return, which takes a while: the tests hold these against them.
FITS = {
    "H100": IterationFit(
        UpdateFit(
            "H100",
            plain_params_per_s=1977293934.6811821,
            host_params_per_s=2517327567.692786,
            link_bytes_per_s=46054612500.0,
            subgroup_s=0.0013867352376993785,
        ),
        converted_params_per_s=1721986450.8073304,
        beside_s=0.7943533915540137,
    ),
    "A100": IterationFit(
        UpdateFit(
            "A100",
            plain_params_per_s=862921779.1411042,
            host_params_per_s=964378018.413109,
            link_bytes_per_s=15542168674.698793,
            subgroup_s=1.6937233555353967e-17,
        ),
        converted_params_per_s=2250883946.811551,
        beside_s=0.6945378772188263,
    ),
}
