"""The process in which megatron-core trains, one rank, a step at each request.

Where there is no GPU it runs with the tests' shim of megatron-core's CUDA calls, over gloo.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_spec import (
    get_t5_decoder_with_local_block_spec,
    get_t5_encoder_with_local_block_spec,
)
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from benchmarks.activations_worker import live_tensor_bytes
from benchmarks.worker import Answer, Subject, Worker, serve
from examples.heap import keep_freed_memory
from examples.memory import StepMemory
from offload.integrations.megatron import (
    build_optimizer,
    close_optimizer,
    session_of,
    wrap_forward_step,
    wrap_model,
)
from tests.offload.integrations.megatron_shim import install

__all__ = ["MODELS", "MODES", "Case", "open_worker"]

MODELS = ("gpt", "bert", "t5")
MODES = ("none", "recompute", "ssd")
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and how its activations are dealt with."""

    model: str
    mode: str
    hidden: int
    layers: int
    seq_len: int
    micro_batch: int
    micro_batches: int
    vocab: int
    threads: int
    directory: str

    def config(self) -> TransformerConfig:
        """Return Megatron's configuration, without the fusions that need a GPU."""
        again: dict[str, Any] = {}
        if self.mode == "recompute":
            again = {"recompute_granularity": "full", "recompute_method": "uniform"}
            again["recompute_num_layers"] = 1
        return TransformerConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.hidden // 64,
            ffn_hidden_size=4 * self.hidden,
            use_cpu_initialization=True,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            persist_layer_norm=False,
            bias_activation_fusion=False,
            pipeline_dtype=torch.float32,
            **again,
        )

    def plan(self) -> dict[str, Any]:
        """Return what moves; in every mode the optimizer is ours, with its states on the SSD."""
        path = [self.directory]
        states = {"placement": "ssd", "path": path, "staging_bytes": 64 * MIB}
        moved = {"mode": "ssd", "path": path, "staging_bytes": 64 * MIB}
        found: dict[str, Any] = {"version": 1, "optimizer": states}
        return found | ({"activations": moved} if self.mode == "ssd" else {})

    def make_model(self, config: TransformerConfig) -> Any:
        """Return the model with its first weights, the same in every mode."""
        torch.manual_seed(0)
        given = {"vocab_size": self.vocab, "max_sequence_length": self.seq_len}
        if self.model == "gpt":
            return GPTModel(config, get_gpt_layer_local_spec(), **given)
        if self.model == "bert":
            return BertModel(config, 0, bert_layer_local_spec, **given, add_binary_head=False)
        encoder = get_t5_encoder_with_local_block_spec(self.layers // 2)
        decoder = get_t5_decoder_with_local_block_spec(self.layers // 2)
        config.num_layers = self.layers // 2
        return T5Model(config, config, encoder, decoder, **given)

    def forward_step(self) -> Callable[..., Any]:
        """Return the forward step as a user of Megatron writes it."""
        rows, length = self.micro_batch, self.seq_len
        places = torch.arange(length)[None].expand(rows, length)
        hidden = torch.tril(torch.ones(1, 1, length, length)) < 0.5
        wide = torch.zeros(rows, 1, length, length, dtype=torch.bool)
        seen = torch.ones(rows, length, dtype=torch.long)

        def loss_of(output: torch.Tensor) -> Any:
            loss = output.float().mean()
            return loss, {"loss": loss.detach().clone()}

        def forward_step(data: Any, model: Any) -> Any:
            tokens = next(data)
            inputs, labels = tokens[:, :-1], tokens[:, 1:]
            if self.model == "gpt":
                return model(inputs, places, hidden, labels=labels), loss_of
            if self.model == "bert":
                found = model(inputs, seen, lm_labels=labels)
                return (found[0] if isinstance(found, tuple) else found), loss_of
            return model(inputs, inputs, wide, hidden.expand_as(wide), wide, labels), loss_of

        return forward_step


class Trainee:
    """Megatron on one rank."""

    def __init__(self, case: Case) -> None:
        torch.set_num_threads(case.threads)
        self._place = tempfile.TemporaryDirectory()
        store = f"file://{self._place.name}/ranks"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        self._case, config = case, case.config()
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
        self._model = [DistributedDataParallel(config, settings, case.make_model(config))]
        wrap_model(self._model, case.plan())
        self._optimizer = build_optimizer(
            OptimizerConfig(optimizer="adam", lr=1e-4, use_distributed_optimizer=True),
            self._model,
            case.plan(),
        )
        self._forward_step = wrap_forward_step(case.forward_step(), lambda: case.micro_batches)
        self._generator = torch.Generator().manual_seed(5)

    def answer(self, request: str) -> Answer:
        """Do one step: "step" timed, or "peak" with its memory; or say "bits" of the weights."""
        if request == "bits":
            found = hashlib.sha256()
            for parameter in self._model[0].parameters():
                found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
            return {"bits": found.hexdigest()}
        if request == "peak":
            resting_bytes = live_tensor_bytes() + self._native("native_bytes")
            with StepMemory() as memory:
                self._step()
            native_bytes = self._native("native_peak_bytes") - self._native("native_bytes")
            session = session_of(self._model)
            stats = None if session is None else session.stats()
            native_bytes += 0 if stats is None else stats.native_peak_bytes
            return {"peak_bytes": resting_bytes + memory.peak_bytes + native_bytes}
        begin = time.perf_counter()
        self._step()
        return {"step_s": time.perf_counter() - begin}

    def _native(self, name: str) -> int:
        """Return what the optimizer's states hold outside of torch."""
        [inner] = (each.optimizer for each in self._optimizer.chained_optimizers)
        return 0 if inner._states is None else int(inner._states._placement.counters()[name])

    def _step(self) -> None:
        case = self._case
        tokens = [
            torch.randint(
                case.vocab, (case.micro_batch, case.seq_len + 1), generator=self._generator
            )
            for _ in range(case.micro_batches)
        ]
        self._model[0].zero_grad_buffer()
        self._optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=[iter(tokens)],
            model=self._model,
            num_microbatches=case.micro_batches,
            seq_length=case.seq_len,
            micro_batch_size=case.micro_batch,
            forward_only=False,
        )
        self._optimizer.step()

    def close(self) -> None:
        """Give files back."""
        session = session_of(self._model)
        if session is not None:
            session.close()
        close_optimizer(self._optimizer)
        self._place.cleanup()


def open_worker(name: str, case: Case) -> Worker:
    """Start a worker; raises WorkerError if it cannot."""
    return Worker(name, __name__, asdict(case))


def _open_subject(settings: Mapping[str, object]) -> tuple[Subject, Answer]:
    rest: dict[str, Any] = dict(settings)
    case = Case(**rest)
    install()  # for this process, where there is no GPU
    Path(case.directory).mkdir(exist_ok=True)
    kept = keep_freed_memory()
    return Trainee(case), {"freed_memory_kept": kept}


if __name__ == "__main__":
    serve(_open_subject)
