"""The life of one rank among those that torchrun started."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

import torch.distributed as dist


@contextlib.contextmanager
def joined_ranks() -> Iterator[int]:
    """Join the ranks that torchrun started; yields how many they are, 0 without torchrun."""
    if not dist.is_torchelastic_launched():
        yield 0
        return
    dist.init_process_group()
    try:
        yield dist.get_world_size()
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process with the exit status `status`, a rank without ending the interpreter first.

    Once there has been a `DistributedDataParallel`, threads of gloo outlive the process group; one
    that lets go of its last tensor just when the interpreter ends aborts the process, after all
    the work is done (pytorch/pytorch#190489; about 1 of 40 runs on two busy cores).
    """
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
