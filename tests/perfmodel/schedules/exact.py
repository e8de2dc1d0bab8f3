"""The best choice by trying all of them: the model of `replay` again, written for every subset.

An array has a row for each subset of the tensors and, where it is two-dimensional, a column for
each tensor.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from perfmodel.schedules.trace import Channel, Limits, SavedTensor, Trace


def exact_peak(trace: Trace, channel: Channel, limits: Limits) -> int:
    """Return the least peak of any subset that leaves through one channel without a stall."""
    tensors = trace.tensors
    count = len(tensors)
    chosen = (np.arange(2**count)[:, None] >> np.arange(count)) & 1 == 1
    chosen = chosen[~(chosen & [tensor.held for tensor in tensors]).any(axis=1)]
    for members in trace.shared():  # of a storage all leave or none
        chosen = chosen[chosen[:, members].all(axis=1) | ~chosen[:, members].any(axis=1)]
    by_need = sorted(range(count), key=lambda index: tensors[index].needed_s)

    read = np.full(chosen.shape, np.inf)
    next_s = np.full(len(chosen), np.inf)
    for index in reversed(by_need):
        begin_s = np.minimum(next_s, tensors[index].needed_s) - channel.read_s(
            tensors[index].nbytes
        )
        next_s = np.where(chosen[:, index], begin_s, next_s)
        read[:, index] = np.where(chosen[:, index], begin_s, np.inf)

    written = np.full(chosen.shape, -np.inf)
    now = np.full(len(chosen), -np.inf)
    for index, tensor in enumerate(tensors):
        at = np.maximum(now, tensor.saved_s)
        left = np.full(len(chosen), channel.write_s(tensor.nbytes))
        for other in by_need:
            meets = chosen[:, other] & (at + left > read[:, other])
            end_s = read[:, other] + channel.read_s(tensors[other].nbytes)
            left = np.where(meets, left - np.maximum(0, read[:, other] - at), left)
            at = np.where(meets, np.maximum(at, end_s), at)
        now = np.where(chosen[:, index], at + left, now)
        written[:, index] = np.where(chosen[:, index], at + left, -np.inf)

    fits = (written <= read + 1e-12).all(axis=1)
    chosen, read, written = chosen[fits], read[fits], written[fits]
    freed = written.copy()
    for members in trace.shared():
        freed[:, members] = written[:, members].max(axis=1)[:, None]
    ends_s = trace.ends_s()
    peak = np.zeros(len(chosen))
    staged_peak = np.zeros(len(chosen))
    for moment in [*(tensor.saved_s for tensor in tensors), *read.T]:
        in_memory = np.zeros(len(chosen))
        staged = np.zeros(len(chosen))
        for index, tensor in enumerate(tensors):
            leaves, whole = chosen[:, index], tensor.nbytes + tensor.rest_bytes
            there = tensor.saved_s <= moment
            back = (read[:, index] <= moment) & (moment <= tensor.released_s)
            kept = np.where(there & (moment <= ends_s[index]), whole, 0)
            moved = np.where(there & (moment <= freed[:, index]), whole, 0)
            in_memory += np.where(leaves, moved + np.where(back, tensor.nbytes, 0), kept)
            going = there & (moment <= written[:, index])
            staged += np.where(leaves & (going | back), tensor.nbytes, 0)
        real = np.isfinite(moment)
        peak = np.maximum(peak, np.where(real, in_memory, 0))
        staged_peak = np.maximum(staged_peak, np.where(real, staged, 0))
    return int(peak[staged_peak <= limits.staging_bytes].min())


def random_case(rng: random.Random, most: int = 14) -> tuple[Trace, Channel, Limits]:
    """Return a step of up to `most` tensors, nested or not, a channel, and maybe a staging cap."""
    count = rng.randint(1, most)
    saved = sorted(rng.random() for _ in range(count))
    needed = sorted((rng.uniform(1, 3) for _ in range(count)), reverse=True)
    disorder = rng.choice([0, 0, 1, count])
    for _ in range(disorder):
        one, other = rng.randrange(count), rng.randrange(count)
        needed[one], needed[other] = needed[other], needed[one]
    tensors = []
    for saved_s, needed_s in zip(saved, needed, strict=True):
        nbytes = rng.randint(1, 1000) if rng.random() < 0.7 else 512
        released_s = needed_s + rng.choice([0, 0.01, 0.1]) * rng.random()
        held = rng.random() < 0.05
        tensors.append(SavedTensor(nbytes, saved_s, needed_s, released_s, held))
    total = sum(tensor.nbytes for tensor in tensors)
    rate = total / rng.uniform(0.05, 3)
    channel = Channel(
        tier="ssd",
        write_bytes_per_s=rate,
        read_bytes_per_s=rate * rng.choice([0.5, 1, 2]),
        latency_s=rng.choice([0, 0.005]),
    )
    limits = Limits(staging_bytes=rng.choice([float("inf"), rng.uniform(0.05, 1) * total]))
    return Trace(tuple(tensors)), channel, limits


def shared_case(rng: random.Random, most: int = 14) -> tuple[Trace, Channel, Limits]:
    """Return the same where some tensors share storages, of which more may be in memory."""
    trace, channel, limits = random_case(rng, most)
    tensors, storages = list(trace.tensors), rng.randint(1, len(trace.tensors))
    with_rest = set()
    for index, tensor in enumerate(tensors):
        storage = rng.randrange(storages)
        rest_bytes = rng.choice([0, rng.randint(1, 2000)]) if storage not in with_rest else 0
        with_rest.add(storage)
        tensors[index] = replace(tensor, storage=storage, rest_bytes=rest_bytes)
    return Trace(tuple(tensors)), channel, limits
