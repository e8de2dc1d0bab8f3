"""One model on one device that takes steps in several modes by turns, in one process.

A GPU has room for one set of weights, and none of an optimizer's states at the sizes in question:
a step is a forward and a backward, which is all that activations take part in.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu

import offload
from examples.memory import StepMemory
from examples.models import MODELS, ModelConfig, Run, call, recompute

__all__ = ["OURS", "PEERS", "Case", "Figures", "Turns", "link_bytes_per_s", "sum_of_bits"]

HEAD_CHANNELS = 128
OURS = ("host", "ssd", "auto")
PEERS: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "save_on_cpu": ("torch", lambda: _save_on_cpu(pin_memory=torch.cuda.is_available())),
    "trl": (
        "trl",
        lambda: import_module("trl.models.activation_offloading").OffloadActivations(),
    ),
    "torchtune": ("torchtune", lambda: import_module("torchtune.training").OffloadActivations()),
}
"""How others offload: the package, and what makes the context of a forward."""

GIB = 1 << 30
# Untyped in torch.
_save_on_cpu: Any = save_on_cpu
_Event: Any = torch.cuda.Event
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and within which bounds."""

    model: str
    hidden: int
    layers: int
    seq_len: int
    micro_batch: int
    vocab: int
    device: str
    directory: str
    staging_bytes: int
    host_bytes: int
    min_tensor_bytes: int
    auto_part: float
    """Of the memory that keep needs: what auto may let saved tensors have."""

    @property
    def name(self) -> str:
        return f"{self.model} {self.hidden}x{self.layers}"

    def config(self) -> ModelConfig:
        """Return the model's shape; the layers of a T5 are those of both its halves together."""
        both = 2 if self.model == "t5" else 1
        return ModelConfig(
            vocab_size=self.vocab,
            # An encoder-decoder takes half of its window in each half.
            seq_len=self.seq_len * both,
            num_layers=max(1, self.layers // both),
            hidden_size=self.hidden,
            num_heads=max(1, self.hidden // HEAD_CHANNELS),
        )


class Turns:
    """The model, and the modes that have been opened. Use as a context manager.

    Raises ImportError or ValueError from `open` for a mode that cannot be had here.
    """

    def __init__(self, case: Case) -> None:
        # Without these two, equal programs may differ in the last bit on a GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        self._stack = ExitStack()
        self._stack.callback(torch.use_deterministic_algorithms, before)
        torch.manual_seed(0)
        self.case = case
        self._device = torch.device(case.device)
        self._run: Run = call
        with self._device:
            self._model = MODELS[case.model](case.config(), self._run_layer).to(torch.bfloat16)
        self._parameters = list(self._model.parameters())
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {}
        self._acts: dict[str, offload.ActivationOffload] = {}
        self._resting_bytes = self._allocated()

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def open(self, mode: str, keep_peak_bytes: float = 0) -> None:
        """Make `mode` ready for steps; auto's bound is a part of what keep needs at its worst."""
        if mode in OURS:
            act = self._stack.enter_context(self._offload(mode, keep_peak_bytes))
            self._acts[mode] = act
            self._contexts[mode] = act.forward
        elif mode in PEERS:
            package, make = PEERS[mode]
            import_module(package)
            try:
                make()  # whatever it refuses, it refuses now
            except AttributeError as error:  # as TRL's without an accelerator
                raise ImportError(f"{package} cannot be used here: {error}") from error
            self._contexts[mode] = make
        else:  # what none of the hooks has a part in
            self._contexts[mode] = nullcontext

    def _offload(self, mode: str, keep_peak_bytes: float) -> offload.ActivationOffload:
        case = self.case
        common: dict[str, Any] = {
            "staging_bytes": case.staging_bytes,
            "min_tensor_bytes": case.min_tensor_bytes,
        }
        if mode == "host":
            return offload.ActivationOffload(tier="host", host_bytes=case.host_bytes, **common)
        if mode == "ssd":
            return offload.ActivationOffload(tier="ssd", path=case.directory, **common)
        on_gpu = self._device.type == "cuda"
        return offload.ActivationOffload(
            tier="ssd",
            path=case.directory,
            host_bytes=case.host_bytes if on_gpu else None,
            memory_bytes=int(case.auto_part * keep_peak_bytes),
            **common,
        )

    def step(self, mode: str, seed: int) -> Figures:
        """Take a step; return its seconds, and of ours what they were spent on."""
        before = self._spent(mode)
        self._synchronize()
        start = time.perf_counter()
        self._step(mode, seed)
        self._synchronize()
        step_s = time.perf_counter() - start
        spent = {key: after - before[key] for key, after in self._spent(mode).items()}
        return {"step_s": step_s, **spent}

    def digest(self, mode: str, seed: int) -> list[int]:
        """Take a step; return a sum of each gradient's bits, weighted by where they stand."""
        self._step(mode, seed)
        return [sum_of_bits(parameter.grad) for parameter in self._parameters]

    def peak_bytes(self, mode: str, seed: int) -> float:
        """Take a step; return its worst moment above the device at rest."""
        before = self._allocated()
        with StepMemory(self._device) as memory:
            self._step(mode, seed)
        peak = before - self._resting_bytes + memory.peak_bytes
        act = self._acts.get(mode)
        if act is not None and self._device.type == "cpu":
            # There the device's memory is the host's, which staging takes as well.
            peak += act.stats().native_peak_bytes + act.stats().page_cache_bytes
        return peak

    def forward_s(self, seed: int) -> float:
        """Return the seconds of a forward that keeps everything."""
        tokens = self._tokens(seed)
        self._run = call
        self._synchronize()
        start = time.perf_counter()
        self._model(tokens[:, :-1], tokens[:, 1:])
        self._synchronize()
        return time.perf_counter() - start

    def facts(self, mode: str) -> dict[str, object]:
        """Return the path that the activations of `mode` took, and what was predicted of it."""
        act = self._acts.get(mode)
        if act is None:
            return {}
        stats = act.stats()
        names = ("io_engine", "direct", "backing", "verify", "predicted_peak_bytes")
        links = [
            {"device": link.device, "pinned": link.pinned, "reason": link.pinned_reason}
            for link in stats.links
        ]
        return {**{name: getattr(stats, name) for name in names}, "links": links}

    def _spent(self, mode: str) -> Figures:
        act = self._acts.get(mode)
        if act is None:
            return {}
        stats = act.stats()
        return {
            "stall_s": stats.stall_s,
            "offloaded_bytes": stats.offloaded_bytes,
            "ssd_write_bytes": stats.ssd_write_bytes,
            "stayed_bytes": stats.scheduled_to_stay_bytes + stats.kept_bytes,
        }

    def _step(self, mode: str, seed: int) -> None:
        act = self._acts.get(mode)
        self._run = call
        if mode == "recompute":
            self._run = recompute
        elif mode == "auto" and act is not None:
            self._run = act.block
        tokens = self._tokens(seed)
        for parameter in self._parameters:
            assert parameter.grad is not None
            parameter.grad.zero_()
        with self._contexts[mode]():
            loss = self._model(tokens[:, :-1], tokens[:, 1:])
        torch.autograd.backward(loss)

    def _run_layer(self, layer: Run, *inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._run(layer, *inputs)
        return out

    def _tokens(self, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        shape = (self.case.micro_batch, self.case.config().seq_len + 1)
        return torch.randint(self.case.vocab, shape).to(self._device)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _allocated(self) -> int:
        if self._device.type == "cuda":
            self._synchronize()
            return torch.cuda.memory_allocated(self._device)
        return 0


def sum_of_bits(tensor: torch.Tensor | None) -> int:
    """Return a sum of the bits of 16-bit elements, weighted by where they stand."""
    assert tensor is not None
    bits = tensor.view(torch.int16).flatten()
    total = 0
    for part in torch.split(
        bits, 1 << 24
    ):  # a whole gradient in int64 would be four times its size
        places = torch.arange(1, part.numel() + 1, device=part.device)
        total = (total * 31 + int((part.long() * places).sum())) % (1 << 64)
    return total


def link_bytes_per_s(device: torch.device, nbytes: int = GIB) -> float | None:
    """Return how fast pinned host memory takes what a GPU has, the best of five; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    best_s = float("inf")
    for _ in range(5):
        begin, end = (_Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        best_s = min(best_s, begin.elapsed_time(end) / 1e3)
    return nbytes / best_s
