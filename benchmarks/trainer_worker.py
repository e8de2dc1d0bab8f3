"""The process in which the Hugging Face Trainer trains, a step at each request."""

from __future__ import annotations

import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.activations_worker import live_tensor_bytes
from benchmarks.worker import Answer, Subject, Worker, serve
from examples.heap import keep_freed_memory
from examples.memory import StepMemory
from offload.integrations.transformers import OffloadTrainer

__all__ = ["MODELS", "Case", "open_worker"]

MODELS = ("llama", "gpt2", "t5")
ADAPTED = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "t5": ["q", "v"]}
"""What LoRA goes beside."""
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """What both train alike."""

    model: str
    lora: bool
    deepspeed: bool
    hidden: int
    layers: int
    seq_len: int
    micro_batch: int
    vocab: int
    threads: int
    directory: str

    def make_model(self) -> Any:
        """Return the model with its first weights, the same for both."""
        torch.manual_seed(0)
        model = self._plain()
        if not self.lora:
            return model
        import peft  # noqa: PLC0415 - optional

        return peft.get_peft_model(
            model, peft.LoraConfig(r=8, target_modules=ADAPTED[self.model], lora_dropout=0.0)
        )

    def _plain(self) -> Any:
        heads = self.hidden // 64
        if self.model == "llama":
            return transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=self.vocab,
                    hidden_size=self.hidden,
                    intermediate_size=4 * self.hidden,
                    num_hidden_layers=self.layers,
                    num_attention_heads=heads,
                )
            )
        if self.model == "gpt2":
            return transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=self.vocab,
                    n_positions=self.seq_len,
                    n_embd=self.hidden,
                    n_layer=self.layers,
                    n_head=heads,
                )
            )
        config = transformers.T5Config(
            vocab_size=self.vocab,
            d_model=self.hidden,
            d_kv=64,
            d_ff=4 * self.hidden,
            num_layers=self.layers // 2,
            num_heads=heads,
            pad_token_id=0,
        )
        config.decoder_start_token_id = 0
        return transformers.T5ForConditionalGeneration(config)

    def arguments(self, directory: str) -> Any:
        """Return the Trainer's arguments."""
        stage = {
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "cpu"},
                "reduce_bucket_size": 5 * 10**6,  # whose default is 2 GiB
            },
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
        }
        return transformers.TrainingArguments(
            output_dir=directory,
            max_steps=1 << 20,
            per_device_train_batch_size=self.micro_batch,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=not self.deepspeed,  # with which accelerate leaves DeepSpeed out
            disable_tqdm=True,
            learning_rate=1e-4,
            deepspeed=stage if self.deepspeed else None,
        )

    def plan(self) -> dict[str, Any]:
        """Return what moves in the one that is ours: activations and states, to the SSD."""
        path = [self.directory]
        return {
            "version": 1,
            "activations": {"mode": "ssd", "path": path, "staging_bytes": 64 * MIB},
            "optimizer": {"placement": "ssd", "path": path, "staging_bytes": 64 * MIB},
        }


class Turns(transformers.TrainerCallback):
    """Has the Trainer wait at each step's begin for a request, and answer at its end."""

    def __init__(self) -> None:
        self.requests: queue.Queue[str] = queue.Queue()
        self.answers: queue.Queue[Answer] = queue.Queue()
        self.trainer: Any = None
        self._begin_s = 0.0
        self._resting_bytes = 0
        self._memory: StepMemory | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for a request; raises InterruptedError when there is none any more."""
        request = self.requests.get()
        if request == "end":
            raise InterruptedError
        if request == "peak":
            self._resting_bytes = live_tensor_bytes() + self._native("native_bytes")
            self._memory = StepMemory()
            self._memory.__enter__()
        self._begin_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answer the request."""
        step_s = time.perf_counter() - self._begin_s
        answer: Answer = {"step_s": step_s, "step": state.global_step}
        if self._memory is not None:
            self._memory.__exit__(None, None, None)
            native = self._native("native_peak_bytes") - self._native("native_bytes", of="states")
            answer["peak_bytes"] = self._resting_bytes + self._memory.peak_bytes + native
            self._memory = None
        self.answers.put(answer)

    def _native(self, name: str, of: str = "all") -> int:
        """Return what is held outside of torch."""
        if not isinstance(self.trainer, OffloadTrainer):
            return 0
        optimizer: Any = self.trainer.optimizer
        while not hasattr(optimizer, "_placement"):
            optimizer = getattr(optimizer, "_states", None) or optimizer.optimizer
        states = int(optimizer._placement.counters()[name])
        session = self.trainer._session
        stats = None if session is None else session.stats()
        if of == "states" or name == "native_bytes" or stats is None:
            return states
        return states + int(stats.native_peak_bytes)


class Trainee:
    """A Trainer in a thread of its own, that goes on when asked."""

    def __init__(self, case: Case, ours: bool) -> None:
        self._threads = case.threads
        torch.set_num_threads(case.threads)
        if case.deepspeed:
            _one_rank()
        self._place = tempfile.TemporaryDirectory()
        self._turns = Turns()
        generator = torch.Generator().manual_seed(5)
        shape = (64, case.seq_len)
        tokens = torch.randint(1, case.vocab, shape, generator=generator)
        given: dict[str, Any] = {
            "model": case.make_model(),
            "args": case.arguments(self._place.name),
            "train_dataset": [{"input_ids": row, "labels": row} for row in tokens],
            "callbacks": [self._turns],
        }
        if ours:
            self._turns.trainer = OffloadTrainer(**given, plan=case.plan())
        else:
            self._turns.trainer = transformers.Trainer(**given)
        if self._turns.trainer.is_deepspeed_enabled is not case.deepspeed:
            raise RuntimeError(f"DeepSpeed is on: {not case.deepspeed}, and was asked otherwise")
        self._thread = threading.Thread(target=self._train)
        self._thread.start()

    def _train(self) -> None:
        try:
            torch.set_num_threads(self._threads)  # which a thread has of its own
            self._turns.trainer.train()
        except InterruptedError:
            pass
        except BaseException as error:  # told to whoever waits, in whichever thread it is
            self._turns.answers.put({"failed": f"{type(error).__name__}: {error}"})

    def answer(self, request: str) -> Answer:
        """Do one step: "step" timed, or "peak" with its memory written down."""
        self._turns.requests.put(request)
        answer = self._turns.answers.get()
        if "failed" in answer:
            raise RuntimeError(str(answer["failed"]))
        return answer

    def close(self) -> None:
        """End the training, and give files back."""
        self._turns.requests.put("end")
        self._thread.join()
        self._place.cleanup()


def _one_rank() -> None:
    """Set what a launcher would, for DeepSpeed with one rank."""
    import deepspeed.ops  # noqa: PLC0415 - optional

    # Would be compiled for minutes, and one rank has nobody to share memory with.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}


def open_worker(name: str, case: Case, *, ours: bool) -> Worker:
    """Start a worker; raises WorkerError if it cannot."""
    return Worker(name, __name__, {"ours": ours, **asdict(case)})


def _open_subject(settings: Mapping[str, object]) -> tuple[Subject, Answer]:
    rest: dict[str, Any] = dict(settings)
    ours = rest.pop("ours")
    case = Case(**rest)
    Path(case.directory).mkdir(exist_ok=True)
    kept = keep_freed_memory()
    return Trainee(case, ours), {"freed_memory_kept": kept}


if __name__ == "__main__":
    serve(_open_subject)
