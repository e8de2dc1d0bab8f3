"""What becomes of saved activations: the flags that say so, and what does it in plain PyTorch."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

from flags import at_least, byte_size, one_of

import offload
from offload.native import inspect_directory

__all__ = ["add_offload_flags", "open_offload", "require_drives"]


def add_offload_flags(add: Callable[..., object]) -> None:
    """List the flags that say what becomes of saved activations."""
    also = {"nvme": "ssd", "cpu": "host"}
    modes = one_of("none", "recompute", "host", "ssd", "auto", aliases=also)
    add("--offload", type=modes, default="none", help="none, recompute, host, ssd, or auto")
    where = "directories on SSDs; spill files have no names, so nothing is ever left there"
    add("--offload-path", nargs="+", default=["/var/tmp"], metavar="DIR", help=where)
    add("--min-tensor-bytes", type=byte_size, default="1MiB", help="smaller tensors stay")
    add("--staging-bytes", type=byte_size, default="64MiB", help="memory on the way to the SSD")
    add("--host-bytes", type=byte_size, help="host memory for a GPU's; with ssd, when that is slow")
    fit = "for saved activations, at whatever time; without, as little as can be had for none"
    add("--memory-bytes", type=byte_size, help=fit)
    slower = "how much longer a step may become for less memory; 0.05 is 5%%"
    add("--tolerated-slowdown", type=at_least(0, float), default=0.0, help=slower)
    add("--spill-bytes", type=byte_size, help="limit on each SSD; without, half of what is free")
    wear = "the most written to each SSD in 24 hours, by each rank"
    add("--ssd-write-bytes-per-day", type=byte_size, help=wear)
    rated = "what the maker says may be written to each SSD (TBW), to tell how long it lasts"
    add("--ssd-rated-bytes", type=byte_size, help=rated)
    engines = one_of("auto", "uring", "posix")
    add("--io-engine", type=engines, default="auto", help="auto, uring or posix")


def open_offload(
    args: argparse.Namespace,
) -> contextlib.AbstractContextManager[offload.ActivationOffload | None]:
    """Make what sends saved activations to their tier, or nothing in the other modes.

    Raises ValueError for a wrong setting or a directory in RAM, OSError for an unusable one,
    MemoryError where there is not as much as --staging-bytes.
    """
    if args.offload in ("none", "recompute"):
        return contextlib.nullcontext()
    tier = "host" if args.offload == "host" else "ssd"
    if tier == "ssd":
        require_drives(args)
    names = (
        *("host_bytes", "min_tensor_bytes", "staging_bytes", "spill_bytes", "memory_bytes"),
        *("tolerated_slowdown", "ssd_write_bytes_per_day", "ssd_rated_bytes", "io_engine"),
    )
    settings = {name: getattr(args, name) for name in names} | args.planned_activations
    return offload.ActivationOffload(tier=tier, path=args.offload_path, **settings)


def require_drives(args: argparse.Namespace) -> None:
    """Raise ValueError for a directory in RAM, OSError for an unusable one."""
    for path in args.offload_path:
        facts = inspect_directory(path)
        if facts.backing == "memory":
            raise ValueError(
                f"--offload-path {path} is in RAM ({facts.filesystem}), where nothing would be "
                "saved; name a directory on an SSD"
            )
