"""The process in which a Llama with LoRA takes steps on one long sequence, at each request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import peft
import torch
import transformers

from benchmarks.worker import Answer, Subject, Worker, serve
from examples.memory import StepMemory
from offload import Session

__all__ = ["SPARSE_WAYS", "WAYS", "Case", "open_worker"]

WAYS = ("plain", "checkpointing", "exact")
"""Untouched; layers run again, their inputs on the SSD and the loss in segments; exact mode."""
SPARSE_WAYS = ("plain", "checkpointing", "sparse")
"""The same, and layers run again with blocks of tokens left out of attention."""
MIB = 1 << 20
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and which way."""

    way: str
    seq_len: int
    hidden: int
    layers: int
    vocab: int
    threads: int
    staging_bytes: int
    directory: str
    ratio: float = 0.4

    def make_model(self) -> Any:
        """Return the model with its first weights, the same each way."""
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            max_position_embeddings=self.seq_len,
            use_cache=False,
        )
        model: Any = transformers.LlamaForCausalLM(config)
        adapters = peft.LoraConfig(r=8, target_modules=[*ADAPTED], lora_dropout=0.0)
        return peft.get_peft_model(model, adapters).train()

    def plan(self) -> dict[str, Any]:
        """Return what is done: the peer has the same loss in segments, and the same drive."""
        if self.way == "plain":
            return {"version": 1}
        tokens: dict[str, Any] = {"mode": "exact"}
        if self.way != "exact":
            tokens["mlp_tile_tokens"] = 0
        if self.way == "sparse":
            tokens |= {"mode": "sparse", "sparse": {"ratio": self.ratio}}
        moved = {"mode": "ssd", "path": [self.directory], "staging_bytes": self.staging_bytes}
        return {"version": 1, "activations": moved, "tokens": tokens}


class Trainee:
    """One rank, one sequence a step."""

    def __init__(self, case: Case) -> None:
        torch.set_num_threads(case.threads)
        self._model = case.make_model()
        if case.way in ("checkpointing", "sparse"):
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
            self._model.enable_input_require_grads()
        trained = [each for each in self._model.parameters() if each.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-3)
        self._session = Session(self._model, case.plan())
        generator = torch.Generator().manual_seed(5)
        self._ids = torch.randint(1, case.vocab, (1, case.seq_len), generator=generator)

    def answer(self, request: str) -> Answer:
        """Take one step, "step" timed or "peak" with its memory."""
        memory = StepMemory() if request == "peak" else None
        begin = time.perf_counter()
        with memory or nullcontext():
            loss = self._step()
        step_s = time.perf_counter() - begin
        stats = self._session.stats()
        native_bytes = 0 if stats is None else stats.native_peak_bytes + stats.page_cache_bytes
        answer: Answer = {"step_s": step_s, "loss": loss}
        if stats is not None:
            answer |= {"stall_s": stats.stall_s, "offloaded_bytes": stats.offloaded_bytes}
        if memory is not None:
            answer["peak_bytes"] = memory.peak_bytes + native_bytes
        return answer

    def _step(self) -> float:
        self._optimizer.zero_grad()
        with self._session.forward():
            loss = self._model(input_ids=self._ids, labels=self._ids).loss
        loss.backward()
        self._optimizer.step()
        return float(loss)

    def close(self) -> None:
        """Give files back."""
        self._session.close()


def open_worker(case: Case) -> Worker:
    """Start a worker; raises WorkerError if it cannot."""
    return Worker(f"{case.way} {case.seq_len}", __name__, asdict(case))


def _open_subject(settings: Mapping[str, object]) -> tuple[Subject, Answer]:
    rest: dict[str, Any] = dict(settings)
    return Trainee(Case(**rest)), {}


if __name__ == "__main__":
    serve(_open_subject)
