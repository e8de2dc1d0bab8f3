"""The process that trains a GPT with its optimizer's states off the device: ours, or a peer's."""

from __future__ import annotations

import os
import socket
import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch

import offload
from benchmarks.case_modes import sum_of_bits
from benchmarks.worker import Answer, Subject, Worker, serve
from examples.models import MODELS, ModelConfig, call

__all__ = ["OURS", "PEERS", "Case", "open_worker"]

LR, BETAS, EPS, DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1
HEAD_CHANNELS = 128
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, early gradients": {"early_gradients": True},
    "ours, all on the host": {"update_schedule": "host"},
    "ours, half moves": {"update_schedule": "share=0.5"},
    "ours, all on the device": {"placement": "device"},
}
"""Settings of `offload.AdamW`: all give the same losses."""
_ON_HOST = {"device": "cpu", "pin_memory": True}
ZERO: dict[str, dict[str, Any]] = {
    "ZeRO-3 offload": {"stage": 3, "offload_optimizer": _ON_HOST},
    "ZeRO-3 offload, ratio 0.5": {"stage": 3, "offload_optimizer": {**_ON_HOST, "ratio": 0.5}},
    "ZeRO-Offload": {"stage": 2, "offload_optimizer": _ON_HOST},
}
"""DeepSpeed's `zero_optimization`."""
PEERS = (*ZERO, "torchao")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What everyone trains, in bfloat16."""

    hidden: int
    layers: int
    seq_len: int
    micro_batch: int
    vocab: int
    device: str

    @property
    def name(self) -> str:
        return f"gpt {self.hidden}x{self.layers}"

    def model(self) -> torch.nn.Module:
        """Return the model with its first weights, the same for everyone."""
        torch.manual_seed(0)
        config = ModelConfig(
            vocab_size=self.vocab,
            seq_len=self.seq_len,
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_heads=max(1, self.hidden // HEAD_CHANNELS),
        )
        with torch.device(self.device):
            return MODELS["gpt"](config, call).to(torch.bfloat16)


class Trainee:
    """A model and what updates it."""

    def __init__(self, case: Case) -> None:
        self._case, self._steps = case, 0
        self._model = case.model()

    def facts(self) -> Answer:
        """Return how large the model is."""
        return {"params": sum(param.numel() for param in self._model.parameters())}

    def answer(self, request: str) -> Answer:
        """Take a step and time it, the update by itself; or say what was chosen and has come."""
        if request == "outcome":
            return self.outcome()
        case = self._case
        generator = torch.Generator().manual_seed(self._steps)
        shape = (case.micro_batch, case.seq_len + 1)
        tokens = torch.randint(case.vocab, shape, generator=generator).to(case.device)
        self._steps += 1
        if case.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of this step, not of how it came to it
        self._synchronize()
        begin_s = time.perf_counter()
        loss = self.backward(tokens[:, :-1], tokens[:, 1:])
        self._synchronize()
        update_s = time.perf_counter()
        self.update()
        self._synchronize()
        end_s = time.perf_counter()
        figures: Answer = {"iteration_s": end_s - begin_s, "update_s": end_s - update_s}
        return {**figures, "loss": float(loss), "peak_device_bytes": self._peak_bytes()}

    @abstractmethod
    def backward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, all gradients being there or on their way."""

    @abstractmethod
    def update(self) -> None:
        """Update all parameters."""

    def outcome(self) -> Answer:
        """Return what was chosen without being asked for, and what has become of the parameters."""
        return {}

    def close(self) -> None:
        """Let the process end."""

    def _synchronize(self) -> None:
        if self._case.device == "cuda":
            torch.cuda.synchronize()

    def _peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self._case.device == "cuda" else 0


class Plain(Trainee):
    """With an optimizer that is called as PyTorch's are."""

    def __init__(self, case: Case, name: str) -> None:
        super().__init__(case)
        params = list(self._model.parameters())
        common: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
        self._optimizer: Any
        if name == "torchao":
            # Its states have the parameters' type, and there are no master copies: less to do.
            make = import_module("torchao.optim").CPUOffloadOptimizer
            self._optimizer = make(params, torch.optim.AdamW, fused=True, **common)
        else:
            self._optimizer = offload.AdamW(params, **common, **OURS[name])

    def backward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        loss: torch.Tensor = self._model(tokens, targets)
        torch.autograd.backward(loss)
        return loss.detach()

    def update(self) -> None:
        """Update all parameters."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def outcome(self) -> Answer:
        """Return how ours is scheduled, and a sum of each parameter's bits."""
        digest = [sum_of_bits(param.detach()) for param in self._model.parameters()]
        side = getattr(self._optimizer, "device_side", None)
        if side is None or side.schedule is None:
            return {"digest": digest}
        sizes = side.schedule.sizes
        shares = {place: side.schedule.share(place) for place in ("resident", "moved", "host")}
        rates = None if side.rates is None else asdict(side.rates)
        chosen: Answer = {"subgroup_params": max(sizes), "shares": shares, "rates": rates}
        return {"digest": digest, **chosen}

    def close(self) -> None:
        """Give memory and threads back."""
        if hasattr(self._optimizer, "close"):
            self._optimizer.close()


class Zero(Trainee):
    """With DeepSpeed's engine."""

    def __init__(self, case: Case, name: str) -> None:
        import deepspeed  # noqa: PLC0415 - optional
        import deepspeed.ops  # noqa: PLC0415

        # Would be compiled for minutes, and one rank has nobody to share memory with.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        deepspeed.init_distributed(dist_backend="nccl" if case.device == "cuda" else "gloo")
        super().__init__(case)
        config = {
            "train_micro_batch_size_per_gpu": case.micro_batch,
            "steps_per_print": 1_000_000,
            "bf16": {"enabled": True},
            "zero_optimization": ZERO[name],
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY},
            },
        }
        self._engine: Any = deepspeed.initialize(
            model=self._model, model_parameters=list(self._model.parameters()), config=config
        )[0]

    def backward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        loss: torch.Tensor = self._engine(tokens, targets)
        self._engine.backward(loss)
        return loss.detach()

    def update(self) -> None:
        """Update all parameters."""
        self._engine.step()


def open_worker(name: str, case: Case) -> Worker:
    """Start the worker `name`, one of OURS or PEERS; raises WorkerError if it cannot."""
    return Worker(name, __name__, {"name": name, **asdict(case)})


def _open_subject(settings: Mapping[str, object]) -> tuple[Subject, Answer]:
    rest: dict[str, Any] = dict(settings)
    name = rest.pop("name")
    case = Case(**rest)
    if name in OURS:  # whose bits are compared: equal programs may differ in the last on a GPU
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings_of_torch: Any = torch.utils.deterministic  # not typed in torch
        settings_of_torch.fill_uninitialized_memory = False  # which takes time
    subject = Zero(case, name) if name in ZERO else Plain(case, name)
    return subject, subject.facts()


if __name__ == "__main__":
    serve(_open_subject)
