"""The device that this process would compute on: what it is, and when it is done."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["host_memory_bytes", "memory_bytes", "name_of", "present_device", "wait_for"]


def present_device() -> torch.device:
    """Return the GPU in use, or the processor where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def wait_for(device: torch.device) -> None:
    """Return when `device` has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name_of(device: torch.device) -> str:
    """Return what its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "processor")


def memory_bytes(device: torch.device) -> int:
    """Return how much memory it has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory_bytes()


def host_memory_bytes() -> int:
    """Return how much memory the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
