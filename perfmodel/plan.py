"""The plan's dataclasses: what a user may set, its defaults, and what is refused at once.

`offload.config` re-exports them. They hold values only; what the values mean on this machine (is
the directory there, how much space is free) is found out by those who use them.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from perfmodel.units import parse_bytes

__all__ = ["TIERS", "ActivationsConfig", "OptimizerConfig", "canonical_tier"]

TIERS = ("device", "host", "ssd")
TIER_ALIASES = {"cpu": "host", "nvme": "ssd"}
SCHEDULES = ("auto", "all")
IO_ENGINES = ("auto", "uring", "posix")
DTYPES = ("float32", "bfloat16", "float16")
PAGE_BYTES = 4096
MOST_BYTES = 1 << 60  # no machine has more, and native sizes end a little above


def nearest(name: str, allowed: Sequence[str]) -> str:
    """Return `, did you mean 'x'?` for the allowed name closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, allowed, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def canonical_tier(name: str, key: str = "tier") -> str:
    """Return the tier that `name` stands for (`cpu` is `host`, `nvme` is `ssd`).

    Raises ValueError for any other name, which `key` was given as.
    """
    if not isinstance(name, str):
        raise ValueError(f"{key}={name!r} is not a name; allowed: {', '.join(TIERS)}")
    tier = TIER_ALIASES.get(name, name)
    if tier not in TIERS:
        is_path = "/" in name
        hint = (
            "; a directory is given as path="
            if is_path
            else nearest(name.lower(), [*TIERS, *TIER_ALIASES])
        )
        raise ValueError(f"{key}={name!r} is not a tier; allowed: {', '.join(TIERS)}{hint}")
    return tier


def require_bytes(key: str, value: object, *, minimum: int = 0) -> None:
    """Raise ValueError unless `value` is a whole number of bytes from `minimum` to 1 EiB."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not minimum <= value <= MOST_BYTES:  # type: ignore[operator]
        raise ValueError(
            f"{key}={value!r} is not a size; it must be a whole number of bytes, at least {minimum}"
            f"{_in_bytes(value)}"
        )


def _in_bytes(value: object) -> str:
    """Return what a size with its unit is in bytes, to be said."""
    try:
        return f": {parse_bytes(value)}" if isinstance(value, str) else ""
    except ValueError:
        return ""


def require_number(key: str, value: object, least: float, most: float) -> None:
    """Raise ValueError unless `value` is a number from `least` to `most`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most:  # type: ignore[operator]
        raise ValueError(f"{key}={value!r} is not a number from {least} to {most}")


def require_choice(key: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        hint = nearest(str(value), allowed)
        raise ValueError(f"{key}={value!r} is not known; allowed: {', '.join(allowed)}{hint}")


def require_whole(key: str, value: object, least: int, most: int) -> None:
    """Raise ValueError unless `value` is a whole number from `least` to `most`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= most:  # type: ignore[operator]
        raise ValueError(f"{key}={value!r} is not a number from {least} to {most}")


def require_block(key: str, value: int) -> None:
    """Raise ValueError unless `value` bytes are whole pages, and no more than 1 GiB."""
    require_bytes(key, value, minimum=PAGE_BYTES)
    if value % PAGE_BYTES:
        raise ValueError(f"{key}={value} is not a multiple of {PAGE_BYTES}")
    if value > 1 << 30:
        raise ValueError(f"{key}={value} is above 1 GiB; choose about 1 MiB")


def require_flag(key: str, value: object) -> None:
    """Raise ValueError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} is not allowed; use True or False (in JSON true, false)")


def require_known(section: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise ValueError for a key that is not known, naming the nearest that is."""
    for key in given:
        if key not in known:
            raise ValueError(
                f"{section}.{key} is not a setting{nearest(key, known)} (known: {', '.join(known)})"
            )


def path_names(value: object) -> tuple[str, ...]:
    """Return one or several directories, or none, as strings; ValueError for anything else."""
    several = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
    names = tuple(os.fspath(path) for path in several if isinstance(path, (str, os.PathLike)))
    if len(names) != len(several) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"path={value!r} is not a directory's name, or a list of such names")
    if len({os.path.normpath(name) for name in names}) < len(names):
        raise ValueError(f"path={value!r} names a directory twice")
    return names


def cpu_numbers(value: object) -> tuple[int, ...]:
    """Return numbers of CPUs; ValueError for anything else than a list of them."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"cpus={value!r} is not a list of CPUs' numbers")
    for cpu in value:
        require_whole("cpus", cpu, 0, 1023)
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class ActivationsConfig:
    """Where saved activations go, and the bounds that hold while they do.

    All sizes are bytes and count per rank. Raises ValueError naming the key, the value and what is
    allowed.
    """

    tier: str = "ssd"
    """`ssd`; `host` where there is a GPU."""
    path: tuple[str, ...] = ()
    """Directories on SSDs; extents are spread over them."""
    min_tensor_bytes: int = 1 << 20
    """Saved tensors smaller than this stay where they are."""
    staging_bytes: int = 256 << 20
    """Hard cap of the arena that staged and read-ahead tensors share. A GPU's tensor must fit."""
    host_bytes: int | None = None
    """What the host tier may hold; None: where `tier` is `host`, a quarter of the memory that is
    available, or of a half as much as each of many GPUs can have; else nothing. With tier `ssd`,
    host memory takes what the SSD is too slow for."""
    device_window_bytes: int | None = None
    """What copies may hold of a GPU's memory in each direction, or one tensor if it is larger;
    None: what the schedule has planned with, and 64 MiB until there is one."""
    spill_bytes: int | None = None
    """Limit of the spill file in each directory; None: half of what is free when it is opened."""
    ssd_write_bytes_per_day: int | None = None
    """The most to be written in each directory in any 24 hours of this process, a 24th of it at
    once and the rest evenly over the day; None: no bound.
    Ranks that share a drive share what it can take."""
    keep_bytes: int | None = None
    """How much may stay in memory when the SSD is full; None: no bound. Beyond it: OSError."""
    read_ahead_bytes: int | None = None
    """How much the backward may have read before it asks, or one tensor if that is larger; 0: none;
    None: half of `staging_bytes`."""
    schedule: str = "auto"
    """`auto`: what a first step showed and the drive can do decide what leaves; `all`: everything
    large does."""
    memory_bytes: int | None = None
    """How much of each forward's saved tensors may be in the device's memory at once, whatever time
    it takes; None: as little as can in the time there is. On a CPU staging counts as well."""
    tolerated_slowdown: float = 0.0
    """How much longer a step may become for the sake of less memory, as a part of it (0.05 is 5 %):
    by waiting for transfers, or by running blocks again where `memory_bytes` sets no limit."""
    ssd_rated_bytes: int | None = None
    """What the maker says that may be written to each drive in its life (TBW); then `stats()` tell
    how many days it lasts."""
    ssd_write_amplification: float = 1.0
    """How many bytes a drive writes to its cells for each that it is given: close to 1 for large
    writes, and what the drive's own counters say."""
    io_engine: str = "auto"
    """`auto`, `uring` or `posix`."""
    block_bytes: int = 1 << 20
    """One I/O request and one checksum; a multiple of 4096."""
    queue_depth: int = 32
    """I/O requests in flight."""
    verify: bool = True
    """Check every block against its CRC32C when it is read."""
    direct: bool = True
    """Bypass the page cache (O_DIRECT) where the file system can."""
    gds: bool = False
    """A GPU's bytes go to the SSD past host memory (GPUDirect Storage, by kvikio). They are not
    verified on that way, whatever `verify` says."""
    recast_parameters: bool = True
    """Make a parameter's low-precision copy again for the backward instead of storing it."""

    def __post_init__(self) -> None:
        """Check every value and replace the aliases of tiers and paths."""
        object.__setattr__(self, "tier", canonical_tier(self.tier))
        object.__setattr__(self, "path", path_names(self.path))
        if self.tier == "ssd" and not self.path:
            raise ValueError(
                "path=() names no directory; tier 'ssd' needs at least one, on a local SSD"
            )
        require_bytes("min_tensor_bytes", self.min_tensor_bytes)
        require_bytes("staging_bytes", self.staging_bytes, minimum=PAGE_BYTES)
        require_block("block_bytes", self.block_bytes)
        for key in ("spill_bytes", "ssd_write_bytes_per_day", "ssd_rated_bytes"):
            if getattr(self, key) is not None:
                require_bytes(key, getattr(self, key), minimum=1)
        for key in (
            *("keep_bytes", "read_ahead_bytes", "memory_bytes"),
            *("host_bytes", "device_window_bytes"),
        ):
            if getattr(self, key) is not None:
                require_bytes(key, getattr(self, key))
        require_choice("io_engine", self.io_engine, IO_ENGINES)
        require_choice("schedule", self.schedule, SCHEDULES)
        require_whole("queue_depth", self.queue_depth, 1, 4096)
        require_number("tolerated_slowdown", self.tolerated_slowdown, 0, 10)
        require_number("ssd_write_amplification", self.ssd_write_amplification, 0.01, 100)
        for key in ("verify", "direct", "gds", "recast_parameters"):
            require_flag(key, getattr(self, key))
        if self.gds and self.tier != "ssd":
            raise ValueError(f"gds=True leads to tier 'ssd', not to {self.tier!r}")

    @classmethod
    def from_mapping(cls, section: Mapping[str, Any]) -> ActivationsConfig:
        """Make the configuration from a JSON section; an unknown key raises ValueError."""
        require_known("activations", section, [field.name for field in fields(cls)])
        return cls(**section)


def shares_of(placement: str) -> dict[str, float]:
    """Return which part of the states lies on each tier: of `"host=0.4,ssd=0.6"`, or of a name.

    Raises ValueError for an unknown tier, a share that is no number, or shares that do not add up.
    """
    if not isinstance(placement, str):
        raise ValueError(f"placement={placement!r} is no tier's name, nor shares of tiers")
    if "=" not in placement:
        try:
            return {canonical_tier(placement.lower(), "placement"): 1.0}
        except ValueError as error:
            raise ValueError(f"{error}; or auto, or shares as in 'host=0.4,ssd=0.6'") from None
    shares: dict[str, float] = {}
    for part in placement.split(","):
        name, _, share = part.partition("=")
        tier = canonical_tier(name.strip(), "placement")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1 or tier in shares:
            raise ValueError(
                f"placement={placement!r} has {part.strip()!r}; each tier stands there once, with "
                "a share from 0 to 1"
            )
        shares[tier] = value
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the shares of placement={placement!r} add up to {total:g}, not to 1")
    return {tier: share for tier, share in shares.items() if share}


def update_schedule_of(name: str) -> tuple[str, float]:
    """Return the kind of schedule that `name` asks for (`auto`, `share`, `stride`), and its number.

    Raises ValueError for anything else.
    """
    if name in ("auto", "host", "device"):
        return ("auto", 0.0) if name == "auto" else ("share", float(name == "device"))
    kind, _, text = str(name).partition("=")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    fits = 0 <= number <= 1 if kind == "share" else kind == "stride" and number in range(1 << 20)
    if not fits:
        raise ValueError(
            f"update_schedule={name!r} is not known; allowed: auto, host, device, share=S with a "
            "part from 0 to 1, stride=N with a whole number"
        )
    return kind, number


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Where the optimizer's fp32 states lie, and the bounds that hold while they move.

    All sizes are bytes and count per rank. Raises ValueError naming the key, the value and what is
    allowed.
    """

    placement: str = "auto"
    """`device`, `host` or `ssd`, or shares that add up to 1: `host=0.4,ssd=0.6`. `auto`: the SSD
    where `path` names one, else the host. Without a GPU, device and host are the same memory."""
    path: tuple[str, ...] = ()
    """Directories on SSDs; subgroups are spread over them."""
    update_schedule: str = "auto"
    """Which of the subgroups that lie on the host are updated on the device, where there is one:
    `auto`, as is measured to take the least time; `host`, none; `device`, all; `share=0.59`, evenly
    spread; `stride=2`, each second one."""
    subgroup_params: int | None = None
    """How many parameters are updated, moved and stored as one; None: beside a device as many as
    the performance model has updated soonest, else as many as keep a drive's queue full."""
    staging_bytes: int = 512 << 20
    """Hard cap of the memory for states on their way to the SSD and back."""
    spill_bytes: int | None = None
    """Limit of the file in each directory; None: half of what is free when it is opened."""
    ssd_write_bytes_per_day: int | None = None
    """The most to be written in each directory in any 24 hours of this process, a 24th of it at
    once and the rest evenly over the day; None: no bound. A step that needs more is an error."""
    early_gradients: bool = False
    """Take each gradient as the backward accumulates it, and leave `grad` None: it is on its way to
    where it is used, and what clips or scales gradients from outside finds none."""
    accumulate_dtype: str | None = None
    """Of the sum of several backwards with `early_gradients`: `float32`, `bfloat16` or `float16`;
    None: the gradients' own, as autograd has it."""
    gradient_bytes: int | None = None
    """The most host memory for gradients that leave a device early; None: for those of states in
    host memory as much as they need, for those of states on the SSD `staging_bytes`."""
    threads: int | None = None
    """That update on the host; None: as many as `cpus`, or as torch computes with."""
    cpus: tuple[int, ...] = ()
    """The only ones that these threads run on, by number; none: wherever the system puts them."""
    io_engine: str = "auto"
    """`auto`, `uring` or `posix`."""
    block_bytes: int = 1 << 20
    """One I/O request and one checksum; a multiple of 4096."""
    queue_depth: int = 32
    """I/O requests in flight."""
    verify: bool = True
    """Check every block against its CRC32C when it is read."""
    direct: bool = True
    """Bypass the page cache (O_DIRECT) where the file system can."""

    def __post_init__(self) -> None:
        """Check every value."""
        object.__setattr__(self, "path", path_names(self.path))
        object.__setattr__(self, "cpus", cpu_numbers(self.cpus))
        require_choice("io_engine", self.io_engine, IO_ENGINES)
        update_schedule_of(self.update_schedule)
        if self.subgroup_params is not None:
            require_whole("subgroup_params", self.subgroup_params, 1, 1 << 40)
        require_whole("queue_depth", self.queue_depth, 1, 4096)
        if self.threads is not None:
            require_whole("threads", self.threads, 1, 1024)
        require_bytes("staging_bytes", self.staging_bytes, minimum=PAGE_BYTES)
        require_block("block_bytes", self.block_bytes)
        if self.gradient_bytes is not None:
            require_bytes("gradient_bytes", self.gradient_bytes)
        for key in ("spill_bytes", "ssd_write_bytes_per_day"):
            if getattr(self, key) is not None:
                require_bytes(key, getattr(self, key), minimum=1)
        for key in ("early_gradients", "verify", "direct"):
            require_flag(key, getattr(self, key))
        if self.accumulate_dtype is not None:
            require_choice("accumulate_dtype", self.accumulate_dtype, DTYPES)
            if not self.early_gradients:
                raise ValueError(
                    f"accumulate_dtype={self.accumulate_dtype!r} is for early_gradients=True: else "
                    "autograd adds up each gradient in its own type"
                )
        if "ssd" in self.shares and not self.path:
            raise ValueError(
                f"path=() names no directory; placement={self.placement!r} needs at least one, "
                "on a local SSD"
            )

    @property
    def shares(self) -> dict[str, float]:
        """Which part of the states lies on each tier."""
        if self.placement == "auto":
            return {"ssd": 1.0} if self.path else {"host": 1.0}
        return shares_of(self.placement)

    @classmethod
    def from_mapping(cls, section: Mapping[str, Any]) -> OptimizerConfig:
        """Make the configuration from a JSON section; an unknown key raises ValueError."""
        require_known("optimizer", section, [field.name for field in fields(cls)])
        return cls(**section)
