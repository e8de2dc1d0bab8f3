"""What a machine does in a second, as a `machine.json` says: measured, or by its makers."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from perfmodel.plan import nearest, require_known, require_number, require_whole
from perfmodel.units import parse_bytes

__all__ = [
    "Curve",
    "Device",
    "Drive",
    "Host",
    "Link",
    "Machine",
    "known_machines",
    "machine_of",
    "read_machine",
]

_MOST = 1e24
_MAY_BE_0 = frozenset(
    [
        *("operator_s", "update_params_per_s", "rated_bytes", "free_bytes"),
        *("processor_bytes_per_s", "beside_bytes_per_s", "beside_s"),
    ]
)


@dataclass(frozen=True)
class Curve:
    """A rate over the size of what is done at once, and by what part of it the rate varies.

    Raises ValueError for sizes that do not grow, or rates that are not positive.
    """

    sizes: tuple[float, ...]
    rates: tuple[float, ...]
    """Of each size, a second."""
    spread: float = 0.0
    """Half of what lies between the slowest and the fastest tenth, as a part of the median."""

    def __post_init__(self) -> None:
        """Check that it is a curve."""
        growing = all(one < other for one, other in zip(self.sizes, self.sizes[1:], strict=False))
        alike = len(self.sizes) == len(self.rates) and self.sizes
        if not alike or not growing or not all(0 < each < _MOST for each in self.rates):
            raise ValueError(
                f"sizes={self.sizes} with rates={self.rates} are no curve: as many of either, "
                "sizes that grow, and rates above 0"
            )
        require_number("spread", self.spread, 0, 10)

    def at(self, size: float) -> float:
        """Return the rate at `size`; between two it goes straight over the size's logarithm."""
        after = bisect_left(self.sizes, size)
        if after == 0 or after == len(self.sizes):
            return self.rates[min(after, len(self.rates) - 1)]
        low, high = self.sizes[after - 1], self.sizes[after]
        part = math.log(size / low) / math.log(high / low)
        return math.exp(
            (1 - part) * math.log(self.rates[after - 1]) + part * math.log(self.rates[after])
        )

    @classmethod
    def of(cls, value: Any) -> Curve:
        """Return the curve that a JSON value stands for: a number, or sizes with rates."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return cls((1.0,), (float(value),))
        if isinstance(value, Mapping):
            require_known("curve", value, [one.name for one in fields(cls)])
            try:
                sizes, rates = (tuple(map(float, value.get(key, ()))) for key in ("sizes", "rates"))
                return cls(sizes, rates, float(value.get("spread", 0.0)))
            except (TypeError, OverflowError) as error:
                raise ValueError(f"a curve has a value of no number: {error}") from None
        raise ValueError(f"{value!r} is no rate, nor sizes with rates")


@dataclass(frozen=True, kw_only=True)
class Device:
    """What computes a model; on a machine without a GPU, its processor."""

    name: str
    memory_bytes: int
    matmul_flops_per_s: Mapping[str, Curve]
    """By type, over the flops of one product."""
    memory_bytes_per_s: Curve
    """Over the bytes of one operator that reads and writes."""
    operators_per_s: Mapping[str, Curve] = field(default_factory=dict)
    """By an operator's name, or that with ` backward`: the bytes that its forward moves over those
    bytes. What computes has its type behind that, as `linear backward bfloat16`: flops over the
    flops of one product, and of `attention` and `attention to all` over the flops for each byte of
    queries. Others: as products of matrices, and as `memory_bytes_per_s` has it."""
    operator_s: float = 0.0
    """What each operator costs beside: a launch, a dispatch."""
    update_params_per_s: float = 0.0
    """Of AdamW in fp32; 0: as `memory_bytes_per_s` has it."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """The memory and the processor of the whole machine."""

    memory_bytes: int
    memory_bytes_per_s: float
    update_params_per_s: float
    """Of AdamW, half-precision gradients and parameters included."""
    cores: int


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between one device and the host, pinned memory."""

    to_host_bytes_per_s: float
    to_device_bytes_per_s: float
    both_bytes_per_s: float
    """Of both directions together, while both are in use."""


@dataclass(frozen=True, kw_only=True)
class Drive:
    """An SSD, or several as one."""

    write_bytes_per_s: float
    read_bytes_per_s: float
    mixed_bytes_per_s: float
    """Of both directions together, while both are in use."""
    free_bytes: int
    rated_bytes: int = 0
    """What may be written in its life (TBW); 0: not known."""
    processor_bytes_per_s: float = 0.0
    """What a core copies, checks and hands over in a second of its time; 0: not known."""
    beside_bytes_per_s: float = 0.0
    """What goes to the drive and back for each second by which that holds up a processor which
    computes meanwhile; 0: not known, and as `processor_bytes_per_s` has it."""
    beside_s: float = 0.0
    """By how much each tensor that goes there and back holds it up besides."""
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One node. Raises ValueError naming the key, the value and what is allowed."""

    name: str
    source: str
    """Where the figures are from."""
    devices: int = 1
    """How many of `device` there are; each has a rank."""
    device: Device
    host: Host
    link: Link | None = None
    """None: the device's memory is the host's."""
    drive: Drive | None = None
    """What all ranks of the node share."""
    network_bytes_per_s: float = 0.0
    """Between the devices, of each; 0: there is one device."""
    between_nodes_bytes_per_s: float = 0.0
    """Between devices of different nodes, of each; 0: not known, and 25 GB/s, the 200 Gb/s of a DGX
    A100."""
    not_measured: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        """Check every figure."""
        require_whole("devices", self.devices, 1, 1 << 20)
        for part in (self.device, self.host, self.link, self.drive):
            for one in fields(part) if part is not None else ():
                value = getattr(part, one.name)
                if isinstance(value, (int, float)):
                    least = 0 if one.name in _MAY_BE_0 else 1
                    require_number(f"{type(part).__name__.lower()}.{one.name}", value, least, _MOST)
        for key in ("network_bytes_per_s", "between_nodes_bytes_per_s"):
            require_number(key, getattr(self, key), 0, _MOST)

    def to_json(self) -> dict[str, Any]:
        """Return what `machine_of` makes this of again."""
        return asdict(self)


def machine_of(data: Any) -> Machine:
    """Return the machine that a `machine.json` describes; ValueError names the key."""
    made: Machine = _made(Machine, data, "machine")
    return made


def _made(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is an object with keys, not {data!r}")
    known = {one.name: one for one in fields(kind)}
    require_known(where, data, list(known))
    hints = get_type_hints(kind)
    found = {}
    for name, one in known.items():
        if name in data:
            found[name] = _value(hints[name], data[name], f"{where}.{name}")
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{where}.{name} is missing{nearest(name, list(data))}")
    return kind(**found)


def _value(hint: Any, value: Any, where: str) -> Any:
    kinds = getattr(hint, "__args__", (hint,))
    if value is None and type(None) in kinds:
        return None
    if kinds[0] is Curve:
        return Curve.of(value)
    if is_dataclass(kinds[0]):
        return _made(kinds[0], value, where)
    if getattr(hint, "__origin__", None) is Mapping:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is an object with a rate for each type, not {value!r}")
        return {key: Curve.of(each) for key, each in value.items()}
    if isinstance(value, str) and where.endswith("_bytes"):
        return parse_bytes(value, where)
    if hint in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"{where}={value!r} is no number")
    if getattr(hint, "__origin__", None) is tuple:
        if not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{where}={value!r} is not a list of texts")
        return tuple(value)
    if hint is str and not isinstance(value, str):
        raise ValueError(f"{where}={value!r} is no text")
    return value


def known_machines() -> Sequence[str]:
    """Return the names of the machines that are described here."""
    folder = resources.files("perfmodel") / "machines"
    return sorted(
        entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name[-5:] == ".json"
    )


def read_machine(name: str) -> Machine:
    """Return a machine by its name, or by the path of its `machine.json`.

    Raises ValueError for a name that is not known or a wrong file, OSError for one not readable.
    """
    known = known_machines()
    if name in known:
        text = (resources.files("perfmodel") / "machines" / f"{name}.json").read_text("utf-8")
    elif name.endswith(".json") or "/" in name:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{name} is no text") from None
    else:
        raise ValueError(
            f"machine={name!r} is not known: {', '.join(known)}, or the path of a machine.json"
            f"{nearest(name, known)}"
        )
    try:
        if not text.strip():
            raise ValueError("the file is empty")
        return machine_of(json.loads(text))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
