"""How windows of tokens come to a model: drawn when they are wanted, or ahead of that by DALI.

Both give the same windows in the same order.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from data import Batch, Tokens, random_rows, split_rows

__all__ = ["LOADERS", "Order", "missing_framework", "missing_package", "open_loader"]

LOADERS = ("torch", "dali")


@dataclass(frozen=True)
class Order:
    """Which windows a rank trains on, one micro-batch after the other."""

    tokens: Tokens
    seq_len: int
    micro_batch: int
    grad_accum: int
    seed: int
    rank: int

    def rows(self) -> Iterator[Any]:
        """Yield micro-batches without end: [micro_batch, seq_len + 1] tokens each."""
        step = 0
        while True:
            for micro in range(self.grad_accum):
                seed = (self.seed, self.rank, step, micro)
                yield random_rows(self.tokens, self.seq_len, self.micro_batch, seed)
            step += 1


def missing_package(name: str) -> str | None:
    """Say which package loader `name` lacks here, and how to get it."""
    if name != "dali":
        return None
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        return f"--loader dali cannot be used ({error}); pip install nvidia-dali-cuda130"
    return None


def missing_framework(name: str) -> str | None:
    """Say why framework `name` cannot train here."""
    if name != "megatron":
        return None
    try:
        importlib.import_module("megatron.core")
        torch.cuda.current_device()  # as megatron-core does everywhere
    except ImportError as error:
        return f"--framework megatron cannot be used ({error}); pip install megatron-core"
    except (AssertionError, RuntimeError) as error:
        return f"--framework megatron trains on GPUs only ({str(error).splitlines()[0]})"
    return None


def open_loader(name: str, order: Order, device: torch.device) -> Iterator[Batch]:
    """Return micro-batches without end: inputs and their successors, int64."""
    return _with_dali(order, device) if name == "dali" else map(split_rows, order.rows())


def _with_dali(order: Order, device: torch.device) -> Iterator[Batch]:
    # Here, since the package is an extra.
    from nvidia.dali import Pipeline, fn, types  # noqa: PLC0415
    from nvidia.dali.plugin.pytorch import DALIGenericIterator  # noqa: PLC0415

    gpu = device.index if device.type == "cuda" else None
    dtype = {1: types.UINT8, 2: types.UINT16, 4: types.INT32}[order.tokens.dtype.itemsize]
    pipeline = Pipeline(batch_size=order.micro_batch, num_threads=1, device_id=gpu)
    with pipeline:
        rows = fn.external_source(source=order.rows(), batch=True, dtype=dtype, ndim=1)
        # Copied to the GPU before they grow to eight bytes a token.
        wide = fn.cast(rows if gpu is None else rows.gpu(), dtype=types.INT64)
        pipeline.set_outputs(wide[:-1], wide[1:])
    batches = DALIGenericIterator([pipeline], ["tokens", "successors"])

    def pairs() -> Iterator[Batch]:
        for (batch,) in batches:
            yield batch["tokens"], batch["successors"]

    return pairs()
