"""What the authors of Deep Optimizer States measured, and on what.

Figures are those of arXiv 2410.21316 and of its authors' raw logs and pictures: four GPUs, a
hundred million parameters a subgroup, sequences of 2048, activation checkpointing, ZeRO-3.
Throughput is in billions of parameters a second of the node, iterations are in seconds.

Throughput there is the number in a model's name over the seconds (8.6 x 2.3 s is 20, for the
"20B"), but what was updated follows from its shape: 17.3 billion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from perfmodel.model import Model

__all__ = [
    "BY_STRIDE",
    "FITTED_MODEL",
    "ITERATIONS",
    "NUM_GPUS",
    "RESIDENTS",
    "SECONDS_BY_RESIDENT",
    "SEQ_LEN",
    "SHAPES",
    "STRIDES",
    "SUBGROUP",
    "IterationRow",
    "Shape",
    "sizes_of",
]

NUM_GPUS, SUBGROUP, SEQ_LEN = 4, 100_000_000, 2048
STRIDES = (0, 2, 3, 4, 6, 8, 10)
"""0: nothing moves, as in the original's baseline, ZeRO-3."""
FITTED_MODEL = "7B"
"""The only one whose rows anything may be fitted to."""
VOCABULARY = 50304


@dataclass(frozen=True)
class Shape:
    """Of a decoder with SwiGLU, its embeddings and its head apart from each other."""

    named: float
    hidden: int
    feedforward: int
    layers: int
    heads: int

    @property
    def params(self) -> int:
        """Return how many there are; the norms' do not count."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.feedforward
        return self.layers * layer + 2 * VOCABULARY * self.hidden

    @property
    def model(self) -> Model:
        """Return the model."""
        return Model(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_heads=self.heads,
            ffn_size=self.feedforward,
            gated=True,
            activation="silu",
            norm="rms",
            positions="rotary",
            attention_bias=False,
            ffn_bias=False,
            vocab_size=VOCABULARY,
        )


SHAPES = {
    "H100": {
        "7B": Shape(7e9, 4096, 11008, 32, 32),
        "8.3B": Shape(8.3e9, 3072, 11008, 72, 32),
        "10B": Shape(10e9, 4096, 12400, 50, 32),
        "13B": Shape(13e9, 5120, 13824, 40, 40),
        "20B": Shape(20e9, 5120, 20480, 40, 64),
    },
    "A100": {
        "7B": Shape(7e9, 4096, 11008, 32, 32),
        "13B": Shape(13e9, 5120, 13824, 40, 40),
        # Layers, hidden size and heads are published; the rest as the other has it, 4 x hidden.
        "20B": Shape(20e9, 4096, 16384, 64, 256),
    },
}
BY_STRIDE = {
    "H100": {
        "7B": (7.8, 14.2, 13.4, 12.5, 11.6, 10.9, 11.1),
        "13B": (7.7, 13.6, 13.2, 12.2, 11.3, 10.7, 10.7),
        "20B": (8.6, 15.3, 14.9, 14.2, 13.3, 13.0, 12.7),
    },
    "A100": {
        "7B": (3.5, 5.3, 4.8, 4.8, 4.7, 4.6, 4.7),
        "13B": (3.5, 5.0, 4.8, 4.6, 4.5, 4.4, 4.3),
        "20B": (3.8, 5.7, 5.6, 5.3, 5.1, 5.1, 5.1),
    },
}
RESIDENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SECONDS_BY_RESIDENT = {0: (2.3, 2.0, 1.8, 1.6, 1.4, 1.2), 2: (1.3, 1.1, 1.0, 0.9, 0.8, 0.7)}
"""Of the update of the 20-billion model on H100s, by stride."""


def sizes_of(shape: Shape) -> tuple[int, ...]:
    """Return the subgroups of one GPU."""
    whole, rest = divmod(shape.params // NUM_GPUS, SUBGROUP)
    return (SUBGROUP,) * whole + ((rest,) if rest else ())


@dataclass(frozen=True, kw_only=True)
class IterationRow:
    """One published iteration. Where the step does not wait, gradients are converted on the GPU."""

    sweep: str
    machine: str = "H100"
    model: str
    stride: int
    seconds: float
    resident: float = 0.0
    micro_batch: int = 1
    blocking: bool = True

    @property
    def fitted(self) -> bool:
        """Whether constants may be fitted to it."""
        return self.model == FITTED_MODEL

    @property
    def case(self) -> str:
        """What ran, in words."""
        way = f"stride {self.stride}" if self.stride else "ZeRO-3"
        if not self.stride and not self.blocking:
            way += ", flush only"
        more = f", {self.resident:.0%} resident" if self.resident else ""
        more += f", micro-batch {self.micro_batch}" if self.micro_batch > 1 else ""
        return f"{self.model} on 4 {self.machine}, {way}{more} ({self.sweep})"


# Seconds of ZeRO-3, and with every second subgroup moved.
_BY_MODEL = {
    "models": {
        "7B": (3.1, 1.6),
        "8.3B": (4.7, 2.4),
        "10B": (4.5, 2.2),
        "13B": (5.7, 2.3),
        "20B": (7.3, 2.9),
    },
    "mean of 100": {
        "7B": (2.954, 1.484),
        "8.3B": (4.401, 2.183),
        "10B": (4.415, 2.154),
        "13B": (5.363, 2.304),
        "20B": (7.100, 2.906),
    },
    "TwinFlow": {
        "7B": (2.6, 1.5),
        "8.3B": (4.1, 2.3),
        "10B": (4.1, 2.1),
        "13B": (4.5, 2.3),
        "20B": (6.0, 2.6),
    },
}
_TWIN_FLOW_RESIDENT = 0.2
# What both sweeps of the 20-billion model begin with is its row of the first table.
_BY_RESIDENT = {
    0.1: (6.6, 2.7),
    0.2: (5.9, 2.6),
    0.3: (5.3, 2.5),
    0.4: (4.8, 2.3),
    0.5: (4.3, 2.2),
}
_BY_MICRO_BATCH = {2: (7.7, 3.3), 4: (8.8, 4.4), 8: (10.8, 6.8)}
_ON_A100 = {"7B": (4.25, 2.75), "13B": (7.57, 4.75), "20B": (12.50, 7.52)}


def _pair(
    sweep: str,
    model: str,
    seconds: tuple[float, float],
    *,
    machine: str = "H100",
    resident: float = 0.0,
    micro_batch: int = 1,
) -> Iterator[IterationRow]:
    for stride, each_s in zip((0, 2), seconds, strict=True):
        yield IterationRow(
            sweep=sweep,
            machine=machine,
            model=model,
            stride=stride,
            seconds=each_s,
            resident=resident,
            micro_batch=micro_batch,
            blocking=not stride,
        )


def _rows() -> Iterator[IterationRow]:
    for sweep, by_model in _BY_MODEL.items():
        resident = _TWIN_FLOW_RESIDENT if sweep == "TwinFlow" else 0.0
        for model, seconds in by_model.items():
            yield from _pair(sweep, model, seconds, resident=resident)
    for resident, seconds in _BY_RESIDENT.items():
        yield from _pair("residents", "20B", seconds, resident=resident)
    for micro_batch, seconds in _BY_MICRO_BATCH.items():
        yield from _pair("micro-batches", "20B", seconds, micro_batch=micro_batch)
    for model, seconds in _ON_A100.items():
        yield from _pair("models", model, seconds, machine="A100")
    yield IterationRow(sweep="split", model="20B", stride=0, seconds=3.811, blocking=False)


ITERATIONS = tuple(_rows())
