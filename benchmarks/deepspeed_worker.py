"""The process that trains with DeepSpeed's ZeRO-3, its states moved by itself or by ours."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.worker import Answer, Subject, Worker, serve
from examples.models import MODELS, ModelConfig, call

__all__ = ["OURS", "STOCK", "Case", "open_worker"]

ADAMW = {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
STOCK = {"stock, host": "cpu", "stock, SSD": "nvme"}
"""What `offload_optimizer.device` says."""
OURS = {"ours, host": "host", "ours, SSD": "ssd"}
"""What `offload.optimizer.placement` says."""
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """What everyone trains, in bfloat16."""

    hidden: int
    layers: int
    seq_len: int
    micro_batch: int
    sub_group_size: int
    threads: int
    directory: str

    def model(self) -> torch.nn.Module:
        """Return the model with its first weights, the same for everyone."""
        torch.manual_seed(0)
        config = ModelConfig(
            seq_len=self.seq_len,
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_heads=max(1, self.hidden // 64),
        )
        return MODELS["gpt"](config, call)

    def config(self, name: str) -> dict[str, Any]:
        """Return DeepSpeed's config, with ours in it where that is named."""
        zero: dict[str, Any] = {"stage": 3, "sub_group_size": self.sub_group_size}
        found: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "steps_per_print": 1 << 30,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": ADAMW},
            "zero_optimization": zero,
        }
        if name in OURS:
            states: dict[str, Any] = {"placement": OURS[name]}
            if OURS[name] == "ssd":
                states |= {"path": [self.directory], "staging_bytes": 512 * MIB}
            return found | {"offload": {"optimizer": states}}
        zero["offload_optimizer"] = {"device": STOCK[name], "pin_memory": False}
        if STOCK[name] == "nvme":
            # As its own tuner has them. (With pipeline_read and pipeline_write it ends in an
            # assertion here, of 0.19.8 and subgroups of these sizes.)
            zero["offload_optimizer"] |= {"nvme_path": self.directory, "buffer_count": 4}
            found["aio"] = {"block_size": MIB, "queue_depth": 32, "intra_op_parallelism": 1}
        return found


class Trainee:
    """An engine that takes a step at each request."""

    def __init__(self, case: Case, name: str) -> None:
        import deepspeed  # noqa: PLC0415 - optional
        import deepspeed.ops  # noqa: PLC0415

        from offload.integrations.deepspeed import initialize  # noqa: PLC0415

        torch.set_num_threads(case.threads)
        # Would be compiled for minutes, and one rank has nobody to share memory with.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        deepspeed.init_distributed(dist_backend="gloo")
        self._case, self._steps = case, 0
        model = case.model()
        self._count = sum(param.numel() for param in model.parameters())
        self._engine: Any = initialize(model=model, config=case.config(name))[0]

    def facts(self) -> Answer:
        """Return how large the model is."""
        return {"params": self._count}

    def answer(self, request: str) -> Answer:
        """Take a step and time it, the update by itself."""
        case = self._case
        generator = torch.Generator().manual_seed(self._steps)
        tokens = torch.randint(256, (case.micro_batch, case.seq_len + 1), generator=generator)
        self._steps += 1
        begin_s = time.perf_counter()
        loss = self._engine(tokens[:, :-1], tokens[:, 1:])
        self._engine.backward(loss)
        update_s = time.perf_counter()
        self._engine.step()
        end_s = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        figures: Answer = {"step_s": end_s - begin_s, "update_s": end_s - update_s}
        return figures | {"loss": float(loss.detach()), "peak_bytes": peak}

    def close(self) -> None:
        """Give files back."""
        self._engine.destroy()


def open_worker(name: str, case: Case) -> Worker:
    """Start the worker `name`, one of OURS or STOCK; raises WorkerError if it cannot."""
    return Worker(name, __name__, {"name": name, **asdict(case)})


def _open_subject(settings: Mapping[str, object]) -> tuple[Subject, Answer]:
    rest: dict[str, Any] = dict(settings)
    name = rest.pop("name")
    case = Case(**rest)
    Path(case.directory).mkdir(exist_ok=True)
    subject = Trainee(case, name)
    return subject, subject.facts()


if __name__ == "__main__":
    serve(_open_subject)
