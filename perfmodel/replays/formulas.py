"""What published formulas and estimators give for arguments that were tried, beside ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from perfmodel.layers import CUDA, Shape, tape_of
from perfmodel.model import Model
from perfmodel.published import (
    deepspeed_zero2_bytes,
    deepspeed_zero3_bytes,
    layer_activation_bytes,
)

__all__ = [
    "LAYERS",
    "ZERO2_ROWS",
    "ZERO3_ROWS",
    "Compared",
    "Zero2Row",
    "Zero3Row",
    "estimates",
    "layer_bytes",
    "saved_bytes",
]

SEQ_LEN = 2048
# Korthikanti et al. (2022), table 3: heads, hidden, batch.
LAYERS = {
    "22B": (64, 6144, 4),
    "175B (GPT-3)": (96, 12288, 1),
    "530B (MT-NLG)": (128, 20480, 1),
    "1T": (160, 25600, 1),
}


class Zero2Row(NamedTuple):
    """What DeepSpeed 0.19.8 returned for stage 2, in bytes."""

    params: int
    devices: int
    nodes: int
    cpu_offload: bool
    host: int
    device: int


class Zero3Row(NamedTuple):
    """What DeepSpeed 0.19.8 returned for stage 3, in bytes."""

    params: int
    largest: int
    devices: int
    nodes: int
    cpu_offload: bool
    cpu_offload_params: bool
    zero_init: bool
    host: int
    device: int


ZERO2_ROWS = (
    Zero2Row(2_851_000_000, 8, 2, True, 273_696_000_000, 5_702_000_000),
    Zero2Row(2_851_000_000, 8, 2, False, 136_848_000_000, 8_909_375_000),
    Zero2Row(6_738_415_616, 1, 1, True, 161_721_974_784, 13_476_831_232),
)
ZERO3_ROWS = (
    Zero3Row(2_851_000_000, 32_000_000, 8, 2, True, True, True, 38_488_500_000, 128_000_000),
    Zero3Row(2_851_000_000, 32_000_000, 8, 2, True, False, False, 136_848_000_000, 484_375_000),
    Zero3Row(2_851_000_000, 32_000_000, 4, 1, False, False, True, 768_000_000, 12_957_500_000),
    Zero3Row(
        6_738_415_616, 131_072_000, 3, 4, False, False, False, 121_291_481_088, 10_631_911_424
    ),
)


@dataclass(frozen=True)
class Compared:
    """Bytes that somebody else's formula has, and ours."""

    case: str
    published: float
    ours: float


def saved_bytes(name: str, *, tensor: int = 1, sequence: bool = False) -> int:
    """Return what one more layer of a tape saves, with plain attention and dropout."""
    heads, hidden, batch = LAYERS[name]
    shape = Shape(
        batch=batch,
        seq_len=SEQ_LEN,
        element_bytes=2,
        tensor=tensor,
        sequence=sequence,
        kernels=replace(CUDA, fused_attention=False),
    )
    one, two = (
        tape_of(
            Model(
                num_layers=layers,
                hidden_size=hidden,
                num_heads=heads,
                vocab_size=51200,
                dropout=0.1,
            ),
            shape,
        ).saved_bytes()
        for layers in (1, 2)
    )
    return two - one


def layer_bytes() -> Iterator[Compared]:
    """Yield what a layer saves, by Korthikanti's formula and by the tape.

    Whole, and on each of 8 ranks that share it without and with the sequence. The formula leaves
    out the statistics of norms: one part in some thousands.
    """
    for name, (heads, hidden, batch) in LAYERS.items():
        for tensor, sequence in ((1, False), (8, False), (8, True)):
            formula = layer_activation_bytes(
                SEQ_LEN, batch, hidden, heads, tensor, sequence=sequence
            )
            shared = f", {tensor} ranks{' and the sequence' * sequence}" if tensor > 1 else ""
            found = saved_bytes(name, tensor=tensor, sequence=sequence)
            yield Compared(f"a layer of {name}{shared}", formula, found)


def estimates() -> Iterator[Compared]:
    """Yield what DeepSpeed's estimators returned, and what ours of them do."""
    for two in ZERO2_ROWS:
        found = deepspeed_zero2_bytes(
            two.params, two.devices, two.nodes, cpu_offload=two.cpu_offload
        )
        name = f"ZeRO-2, {two.params / 1e9:.1f}B on {two.nodes} x {two.devices}"
        name += " offloaded" if two.cpu_offload else ""
        yield Compared(f"{name}, host", two.host, found.host_bytes)
        yield Compared(f"{name}, device", two.device, found.device_bytes)
    for three in ZERO3_ROWS:
        found = deepspeed_zero3_bytes(
            three.params,
            three.largest,
            three.devices,
            three.nodes,
            cpu_offload=three.cpu_offload,
            cpu_offload_params=three.cpu_offload_params,
            zero_init=three.zero_init,
        )
        name = f"ZeRO-3, {three.params / 1e9:.1f}B on {three.nodes} x {three.devices}"
        name += " offloaded" if three.cpu_offload else ""
        name += " with parameters" if three.cpu_offload and three.cpu_offload_params else ""
        yield Compared(f"{name}, host", three.host, found.host_bytes)
        yield Compared(f"{name}, device", three.device, found.device_bytes)
