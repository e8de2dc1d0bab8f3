"""The process in which one mode trains: none, recompute, ssd or auto, a step at each request."""

from __future__ import annotations

import gc
import hashlib
import math
import statistics
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

import offload
from benchmarks.worker import Answer, Subject, Worker, serve
from examples.heap import keep_freed_memory
from examples.memory import StepMemory
from examples.models import MODELS, ModelConfig, Run, call, recompute
from offload.calibrate.operators import PROBE, operator_pieces, seconds_of
from offload.calibrate.timing import Stopwatch
from offload.native import FaultPlan

__all__ = ["PROBE_FLOPS", "Trainee", "Training", "open_worker"]

PROBE_FLOPS = 2.0 * math.prod(PROBE)
"""Of the product that tells how fast the machine is at the moment."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every mode trains alike; what follows `threads` is for ssd and auto."""

    model: str
    layers: int
    hidden: int
    heads: int
    seq_len: int
    micro_batch: int
    vocab: int
    dropout: float
    optimizer: str
    threads: int
    directory: str
    staging_bytes: int
    min_tensor_bytes: int
    io_engine: str
    verify: bool
    schedule: str = "auto"
    bytes_per_s: float = 0.0
    """The drive is held to this; 0: not at all."""
    memory_bytes: int | None = None
    placement: str = ""
    """Of the states of `offload.AdamW`, which takes the optimizer's place; none: PyTorch's own."""
    subgroup_params: int = 1 << 18


class Trainee:
    """A model with preallocated gradients, its optimizer, and one mode of keeping activations."""

    def __init__(self, training: Training, mode: str) -> None:
        torch.set_num_threads(training.threads)
        torch.manual_seed(0)
        self._training = training
        self._act: offload.ActivationOffload | None = None
        run: Run = recompute if mode == "recompute" else call
        if mode in ("ssd", "auto"):
            self._act = open_offload(training)
            run = self._act.block if mode == "auto" else call
        config = ModelConfig(
            vocab_size=training.vocab,
            seq_len=training.seq_len,
            num_layers=training.layers,
            hidden_size=training.hidden,
            num_heads=training.heads,
            dropout=training.dropout,
        )
        self._model = MODELS[training.model](config, run)
        self._parameters = list(self._model.parameters())
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer = open_optimizer(training, self._parameters)
        self._num_steps = 0

    def facts(self) -> Answer:
        """Return the path that activations take."""
        if self._act is None:
            return {"parameters": sum(parameter.numel() for parameter in self._parameters)}
        stats = self._act.stats()
        names = ("io_engine", "io_engine_reason", "direct", "direct_reason", "registered_buffers")
        return {name: getattr(stats, name) for name in (*names, "backing", "verify")}

    def answer(self, request: str) -> Answer:
        """Do one step: "step" timed, "digest" hashed, or "peak" with its memory written down.

        Or "probe": time a product of matrices that is the same in every process.
        """
        if request == "step":
            return self.timed_step()
        if request == "probe":
            return {"probe_s": probe_s()}
        return self.digested_step() if request == "digest" else self.measured_step()

    def timed_step(self) -> Answer:
        """Return the wall and CPU seconds of one step, and where those of ssd went."""
        tokens = self._next_tokens()
        before = self._seconds_spent()
        start, start_cpu = time.perf_counter(), time.process_time()
        self._backward(tokens)
        self._optimizer.step()
        step_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
        spent = {key: after - before[key] for key, after in self._seconds_spent().items()}
        return {"step_s": step_s, "cpu_s": cpu_s, **spent}

    def digested_step(self) -> Answer:
        """Return the loss and a hash of all gradients of one step, to the bit."""
        loss = self._backward(self._next_tokens())
        digest = hashlib.blake2b()
        for parameter in self._parameters:
            assert parameter.grad is not None
            digest.update(parameter.grad.numpy().data)
        self._optimizer.step()
        return {"loss": loss.hex(), "gradients": digest.hexdigest()}

    def measured_step(self) -> Answer:
        """Return the worst moment of one step: torch's above its start, and what is not torch's."""
        tokens = self._next_tokens()
        states_bytes = self._states_count("native_bytes")
        resting_bytes = live_tensor_bytes() + states_bytes
        offloaded_bytes, recomputed = self._offloaded_bytes(), self._recomputed_blocks()
        with StepMemory() as memory:
            self._backward(tokens)
            page_cache_bytes = self._page_cache_bytes()
            self._optimizer.step()
        native_bytes = self._states_count("native_peak_bytes") - states_bytes
        if self._act is not None:
            native_bytes += self._act.stats().native_peak_bytes
            page_cache_bytes = max(page_cache_bytes, self._page_cache_bytes())
        page_cache_bytes += self._states_count("page_cache_bytes")
        return {
            "resting_bytes": resting_bytes,
            "torch_peak_bytes": memory.peak_bytes,
            "native_peak_bytes": native_bytes,
            "page_cache_bytes": page_cache_bytes,
            "offloaded_bytes": self._offloaded_bytes() - offloaded_bytes,
            "recomputed_blocks": self._recomputed_blocks() - recomputed,
        }

    def close(self) -> None:
        """Give back the spill."""
        if self._act is not None:
            self._act.close()
        if isinstance(self._optimizer, offload.AdamW):
            self._optimizer.close()

    def _next_tokens(self) -> torch.Tensor:
        # The same windows, and the same to be dropped, in every mode: all are at the same step.
        self._num_steps += 1
        torch.manual_seed(self._num_steps)
        shape = (self._training.micro_batch, self._training.seq_len + 1)
        return torch.randint(self._training.vocab, shape)

    def _forward(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._act is None else self._act.forward()

    def _backward(self, tokens: torch.Tensor) -> float:
        # Kept allocated: what a step needs on top of the process at rest are its activations.
        self._optimizer.zero_grad(set_to_none=False)
        with self._forward():
            loss = self._model(tokens[:, :-1], tokens[:, 1:])
        torch.autograd.backward(loss)
        return float(loss.detach())

    def _seconds_spent(self) -> dict[str, float]:
        if self._act is None:
            return {}
        stats = self._act.stats()
        return {"stall_s": stats.stall_s, "copy_s": stats.copy_s, "verify_s": stats.verify_s}

    def _states_count(self, name: str) -> int:
        """Return what the optimizer's SSD says of itself, 0 where it has none."""
        if not isinstance(self._optimizer, offload.AdamW):
            return 0
        return int(self._optimizer._placement.counters()[name])

    def _offloaded_bytes(self) -> int:
        return 0 if self._act is None else self._act.stats().offloaded_bytes

    def _recomputed_blocks(self) -> int:
        return 0 if self._act is None else self._act.stats().recomputed_blocks

    def _page_cache_bytes(self) -> int:
        return 0 if self._act is None else self._act.stats().page_cache_bytes


def probe_s() -> float:
    """Return the median seconds of a product that calibration times as well: `PROBE_FLOPS`."""
    pieces = operator_pieces(torch.device("cpu"), torch.float32, ())
    [probe] = (each for each in pieces if (each.name, each.amount) == ("linear", PROBE_FLOPS))
    return statistics.median(seconds_of(probe, Stopwatch(torch.device("cpu"), least=7)))


def open_offload(training: Training) -> offload.ActivationOffload:
    """Open what sends activations to the SSD."""
    held = FaultPlan(bytes_per_s=training.bytes_per_s) if training.bytes_per_s else None
    return offload.ActivationOffload(
        tier="ssd",
        path=training.directory,
        staging_bytes=training.staging_bytes,
        min_tensor_bytes=training.min_tensor_bytes,
        memory_bytes=training.memory_bytes,
        io_engine=held or training.io_engine,
        verify=training.verify,
        schedule=training.schedule,
    )


def open_optimizer(
    training: Training, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """Make what updates the parameters."""
    if training.placement:
        return offload.AdamW(
            parameters,
            lr=1e-4,
            placement=training.placement,
            path=training.directory if "ssd" in training.placement else (),
            subgroup_params=training.subgroup_params,
            staging_bytes=training.staging_bytes,
            io_engine=training.io_engine,
        )
    chosen = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.SGD
    return chosen(parameters, lr=1e-4, fused=True)


def live_tensor_bytes() -> int:
    """Return the bytes of every tensor alive in this process, a storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # isinstance() wakes lazy modules by asking them
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if thing.grad is not None:
                gradient = thing.grad.untyped_storage()
                storages[gradient.data_ptr()] = gradient.nbytes()
    return sum(storages.values())


def open_worker(name: str, mode: str, training: Training) -> Worker:
    """Start the worker `name` that trains in `mode`; raises WorkerError if it cannot."""
    return Worker(name, __name__, {"mode": mode, **asdict(training)})


def _open_subject(settings: Mapping[str, object]) -> tuple[Subject, Answer]:
    rest: dict[str, Any] = dict(settings)
    mode = rest.pop("mode")
    kept = keep_freed_memory()  # in every mode, as train_gpt.py does
    trainee = Trainee(Training(**rest), mode)
    return trainee, {**trainee.facts(), "freed_memory_kept": kept}


if __name__ == "__main__":
    serve(_open_subject)
