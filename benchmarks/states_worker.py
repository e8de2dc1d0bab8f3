"""The process that updates a model whose optimizer states lie on the SSD: ours or DeepSpeed's."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

import offload
from benchmarks.io_workload import timed
from benchmarks.worker import Answer, Subject, Worker, serve

__all__ = ["STATE_BYTES", "Sizes", "open_worker"]

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
STATE_BYTES = 12
"""Of each parameter, in fp32: two moments and the master copy."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What everyone updates: `params` bfloat16 parameters in tensors of `tensor_params`."""

    directory: str
    params: int
    tensor_params: int
    subgroup_params: int
    staging_bytes: int
    threads: int


class Layer(torch.nn.Module):
    """Holds one parameter, whose gradient is what it is multiplied by."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(count, generator=generator).bfloat16()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, grad: torch.Tensor) -> torch.Tensor:
        """Return a number that grows by `grad` with the parameter."""
        return (self.weight * grad).sum()


class Model(torch.nn.Module):
    """Many of them, and the same gradient for each."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        count = sizes.tensor_params
        self.layers = torch.nn.ModuleList(
            Layer(count, seed) for seed in range(sizes.params // count)
        )
        self.grad = torch.randn(count, generator=torch.Generator().manual_seed(1 << 20)).bfloat16()

    def forward(self) -> torch.Tensor:
        """Return the loss."""
        return torch.stack([layer(self.grad) for layer in self.layers]).sum()


class Ours:
    """`offload.AdamW`."""

    def __init__(self, sizes: Sizes) -> None:
        self._model = Model(sizes)
        self._params = list(self._model.parameters())
        self._optimizer = offload.AdamW(
            self._params,
            LR,
            BETAS,
            EPS,
            DECAY,
            placement="ssd",
            path=sizes.directory,
            subgroup_params=sizes.subgroup_params,
            staging_bytes=sizes.staging_bytes,
            threads=sizes.threads,
        )
        for param in self._params:
            param.grad = self._model.grad.clone()

    def facts(self) -> Answer:
        """Return the path that states take."""
        return {"memory_bytes": self._optimizer.memory_bytes()}

    def answer(self, request: str) -> Answer:
        """Do one step, timed; or say what is in the parameters."""
        if request == "step":
            return timed(self._optimizer.step)
        return {"sum": [float(param.detach().double().sum()) for param in self._params]}

    def close(self) -> None:
        """Give back the space."""
        self._optimizer.close()


class ZeroInfinity:
    """DeepSpeed's ZeRO-3 with `offload_optimizer: nvme`, reading and writing in its pipeline."""

    def __init__(self, sizes: Sizes) -> None:
        import deepspeed  # noqa: PLC0415 - optional
        import deepspeed.ops  # noqa: PLC0415

        # Would be compiled for minutes, and one rank has nobody to share memory with.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        deepspeed.init_distributed(dist_backend="gloo")
        self._model = Model(sizes)
        self._engine: Any = deepspeed.initialize(
            model=self._model,
            model_parameters=list(self._model.parameters()),
            config=self._config(sizes),
        )[0]
        self._params = list(self._model.parameters())

    def _config(self, sizes: Sizes) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 1_000_000,
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "sub_group_size": sizes.subgroup_params,
                "offload_optimizer": {
                    "device": "nvme",
                    "nvme_path": sizes.directory,
                    # Of each of four tensors: one read, one in work, one written, one spare.
                    "buffer_count": 16,
                    "pipeline_read": True,
                    "pipeline_write": True,
                },
            },
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY},
            },
            "aio": {
                "block_size": 1 << 20,
                "queue_depth": 32,
                "intra_op_parallelism": 1,
                "single_submit": False,
                "overlap_events": True,
                "use_gds": False,
            },
        }

    def facts(self) -> Answer:
        """Return nothing: it does not say."""
        return {}

    def answer(self, request: str) -> Answer:
        """Do one step, timed; or say what is in the parameters."""
        if request == "step":
            # Gradients go to the drive in the backward, which is not timed.
            self._engine.backward(self._engine())
            return timed(self._engine.step)
        import deepspeed  # noqa: PLC0415

        with deepspeed.zero.GatheredParameters(self._params):
            return {"sum": [float(param.detach().double().sum()) for param in self._params]}

    def close(self) -> None:
        """Let the process end."""


def open_worker(name: str, sizes: Sizes) -> Worker:
    """Start the worker `name`, of ours or DeepSpeed's; raises WorkerError if it cannot."""
    return Worker(name, __name__, {"name": name, **asdict(sizes)})


def _open_subject(settings: Mapping[str, object]) -> tuple[Subject, Answer]:
    rest: dict[str, Any] = dict(settings)
    name = rest.pop("name")
    sizes = Sizes(**rest)
    torch.set_num_threads(sizes.threads)
    subject = Ours(sizes) if name == "ours" else ZeroInfinity(sizes)
    return subject, subject.facts()


if __name__ == "__main__":
    serve(_open_subject)
