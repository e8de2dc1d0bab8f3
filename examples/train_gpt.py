"""Train a transformer on text, with its saved activations in memory, recomputed, or on an SSD.

    python examples/train_gpt.py --offload none
    torchrun --nproc_per_node 2 examples/train_gpt.py --offload ssd --offload-path /mnt/nvme

The losses are the same to the bit; memory and time differ, and both are measured. From here on
down: the flags, the training step with its two lines of offloading, the run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from data import Corpus, evenly_spaced, load_corpus
from flags import Parser, at_least, in_flags, one_of
from heap import keep_freed_memory
from loaders import LOADERS, Order, missing_framework, missing_package, open_loader
from longer import add_token_flags, kept_of, look, segment_of, shorten, token_problem
from memory import StepMemory, resident_bytes
from models import MODELS, ModelConfig, Run, call, recompute
from offloading import add_offload_flags, open_offload
from optimizers import add_optimizer_flags, clip, learning_rate, make_optimizer
from plans import add_plan_flags, follow_plan, recompute_some
from ranks import joined_ranks, leave
from summary import Measured, conclusion, summarize
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import offload
from offload.config import Plan

MIB = 1 << 20
VALIDATION_WINDOWS = 32


def make_parser() -> Parser:
    """List the flags."""
    parser = Parser(
        prog="train_gpt.py",
        description="Train a transformer on text. Sizes may be written 64MiB; they are per rank.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_offload_flags(add)
    add_optimizer_flags(add)
    add_plan_flags(add)
    models = one_of(*MODELS)
    add("--model", type=models, default="gpt", help=", ".join(MODELS))
    add("--layers", type=at_least(1), default=6, help="of the encoder, or the decoder, or of each")
    add("--hidden", type=at_least(1), default=384, help="channels")
    add("--heads", type=at_least(1), default=6, help="attention heads; divides --hidden")
    add("--seq-len", type=at_least(1), default=256, help="tokens in a window")
    add("--micro-batch", type=at_least(1), default=8, help="windows in a forward, on each rank")
    add("--grad-accum", type=at_least(1), default=1, help="forwards in a step")
    add("--dropout", type=at_least(0, float), default=0.0, help="of channels while training")
    add("--steps", type=at_least(1), default=200, help="optimizer steps")
    add("--dtype", type=one_of("fp32", "bf16"), default="fp32", help="fp32, or bf16 by autocast")
    add("--seed", type=at_least(0), default=0, help="of the first weights and the data's order")
    add("--lr", type=at_least(0, float), default=1e-3, help="highest learning rate")
    add("--max-norm", type=at_least(0, float), default=1.0, help="of the gradients; 0 for any")
    add("--data", default="stdlib", help="stdlib, a text file, a folder, or .bin of uint16 tokens")
    add("--loader", type=one_of(*LOADERS), default="torch", help="what brings data: torch or dali")
    add("--eval-every", type=at_least(0), default=50, help="steps between validations; 0 for none")
    add("--summary", metavar="FILE", help="where to write what was measured, as JSON")
    frameworks = one_of("torch", "megatron", later=("deepspeed",))
    add("--framework", "--engine", type=frameworks, default="torch", help="torch or megatron")
    add("--tensor-parallel", type=at_least(1), default=1, help="ranks to a layer, with megatron")
    add("--pipeline-parallel", type=at_least(1), default=1, help="stages, with megatron")
    add_token_flags(add)
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with status 2 and one line where it cannot be followed."""
    parser = make_parser()
    args = parser.parse_known_flags(argv)
    if args.hidden % args.heads:
        parser.error(f"--heads {args.heads} does not divide --hidden {args.hidden}; choose both so")
    if args.model == "llama" and args.hidden // args.heads % 2:
        parser.error(f"--heads {args.heads}: llama turns pairs, so hidden / heads must be even")
    if args.model == "t5" and args.seq_len < 2:
        parser.error(f"--seq-len {args.seq_len}: t5 reads one half and writes the other; take more")
    if args.optimizer_placement is not None and args.optimizer != "offload":
        parser.error("--optimizer-placement is nothing to --optimizer torch; use it with offload")
    if args.memory_bytes is not None and args.offload in ("none", "recompute"):
        parser.error(f"--memory-bytes is nothing to --offload {args.offload}; use it with auto")
    if args.framework == "torch" and args.tensor_parallel * args.pipeline_parallel > 1:
        parser.error("--tensor-parallel and --pipeline-parallel need --framework megatron")
    if problem := token_problem(args):
        parser.error(problem)
    if args.dropout >= 1:
        parser.error(f"--dropout {args.dropout} would drop everything; choose one below 1")
    if args.summary:
        summary = Path(args.summary)
        if summary.is_dir() or not os.access(summary.parent, os.W_OK):
            parser.error(f"--summary {summary} cannot be written; name a file in a folder that can")
    return args


# ---- Training ------------------------------------------------------------------------------------


class Trainer:
    """What one rank trains with (model, data, optimizer), and one step of it."""

    def __init__(
        self, args: argparse.Namespace, corpus: Corpus, act: offload.ActivationOffload | None
    ) -> None:
        self.args, self.corpus, self.act = args, corpus, act
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.tokens_per_step = args.micro_batch * args.grad_accum * args.seq_len * self.num_ranks
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
            torch.cuda.set_device(self.device)
        order = Order(
            corpus.train, args.seq_len, args.micro_batch, args.grad_accum, args.seed, self.rank
        )
        self.batches = open_loader(args.loader, order, self.device)
        torch.manual_seed(args.seed)
        config = ModelConfig(
            vocab_size=corpus.vocab_size,
            seq_len=args.seq_len,
            num_layers=args.layers,
            hidden_size=args.hidden,
            num_heads=args.heads,
            dropout=args.dropout,
            segment_tokens=segment_of(args.tokens, corpus.vocab_size),
        )
        # How a layer is run: as it is, again in the backward, or as the schedule says.
        run: Run = {"recompute": recompute, "auto": act.block if act else call}.get(
            args.offload, call
        )
        if getattr(args, "recompute", None) is not None:  # a plan names them, or none
            run = recompute_some(args.recompute, args.layers * (2 if args.model == "t5" else 1))
        self.bare = MODELS[args.model](config, run).to(self.device)
        self.tokens = shorten(args, self.bare)
        self.probe: dict[str, Tensor] | None = None  # the batch that --meter-steps asks about
        parameters = list(self.bare.parameters())
        # Made now and never set to None: what a step then needs on top is its activations.
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.model: nn.Module = self.bare
        if self.num_ranks > 1:
            self.model = DistributedDataParallel(self.bare, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(args, parameters)

    def resident_bytes(self) -> int:
        """Return what stays between steps."""
        return resident_bytes(self.bare, self.optimizer)

    def step(self, step: int) -> float:
        """Train on the batch of this step and return its loss, the mean over all ranks."""
        args = self.args
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        self.optimizer.zero_grad(set_to_none=False)
        total = torch.zeros((), device=self.device)
        for micro in range(args.grad_accum):
            batch = next(self.batches)
            look(self, step, micro, batch)
            # Ranks exchange gradients once a step, in its last backward.
            with self.no_exchange() if micro + 1 < args.grad_accum else contextlib.nullcontext():
                # What autograd saves in here goes to the SSD ...
                with self.act.forward() if self.act else contextlib.nullcontext():
                    loss = self.loss(self.model, batch) / args.grad_accum
                # ... and comes back in here.
                loss.backward()
            total += loss.detach()
        clip(self.optimizer, self.bare.parameters(), args.max_norm)
        self.optimizer.step()
        return self.mean_over_ranks(total)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return how badly `model` predicts what it is to predict."""
        with torch.autocast(self.device.type, torch.bfloat16, self.args.dtype == "bf16"):
            loss: Tensor = model(*(part.to(self.device) for part in batch))
        return loss

    @torch.no_grad()
    def validate(self) -> float:
        """Return the loss on text that is never trained on, the mean over all ranks."""
        self.bare.eval()
        windows = evenly_spaced(
            self.corpus.validation, self.args.seq_len, VALIDATION_WINDOWS, self.rank, self.num_ranks
        )
        total = torch.zeros((), device=self.device)
        tokens, successors = (torch.split(part, self.args.micro_batch) for part in windows)
        for batch in zip(tokens, successors, strict=True):
            total += self.loss(self.bare, batch) * len(batch[0]) / VALIDATION_WINDOWS
        self.bare.train()
        return self.mean_over_ranks(total)

    def no_exchange(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which a backward keeps its gradients to this rank."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def mean_over_ranks(self, value: Tensor) -> float:
        """Return the mean of a scalar over all ranks, the same on each."""
        if self.num_ranks > 1:
            dist.all_reduce(value)
        return value.item() / self.num_ranks


class AnyTrainer(Protocol):
    """What the run asks of a trainer, whichever framework it is made of."""

    args: argparse.Namespace
    corpus: Corpus
    act: offload.ActivationOffload | None
    rank: int
    num_ranks: int
    tokens_per_step: int
    device: torch.device
    bare: nn.Module

    def step(self, step: int) -> float:
        """Train on the batch of this step and return its loss, the mean over all ranks."""

    def validate(self) -> float:
        """Return the loss on text that is never trained on."""

    def resident_bytes(self) -> int:
        """Return what stays between steps."""


Make = Callable[[], AnyTrainer]

# ---- The run -------------------------------------------------------------------------------------


def train(trainer: AnyTrainer) -> Measured:
    """Run all steps and show how they go."""
    args, act = trainer.args, trainer.act
    # By the third step the optimizer has its state and DDP its buckets.
    measured = Measured(min(2, args.steps - 1), trainer.tokens_per_step)
    with tqdm(total=args.steps, disable=trainer.rank > 0, unit="step", dynamic_ncols=True) as bar:
        for step in range(args.steps):
            memory = StepMemory(trainer.device)
            begin = time.perf_counter()
            with memory if step == measured.watched_step else contextlib.nullcontext():
                loss = trainer.step(step)
            measured.step_s.append(time.perf_counter() - begin)
            measured.losses.append(loss)
            measured.tensor_bytes = max(measured.tensor_bytes, memory.peak_bytes)
            shown = {"loss": f"{loss:.3f}"} | kept_of(trainer)
            shown["tokens/s"] = f"{trainer.tokens_per_step / measured.step_s[-1]:,.0f}"
            if act:
                stats = act.stats()
                measured.note_native(stats)
                shown["stall"] = f"{stats.stall_s:.1f}s"
            if step >= measured.watched_step:
                shown["peak"] = f"{measured.peak_activation_bytes() / MIB:,.0f}MiB"
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if args.eval_every and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
                validation = trainer.validate()
                if trainer.rank == 0:
                    bar.write(f"step {step + 1}: loss {loss:.4f}, validation {validation:.4f}")
    measured.resident_bytes = trainer.resident_bytes()
    return measured


def introduce(trainer: AnyTrainer) -> None:
    """Say what is trained on what, and which path the activations take."""
    args, corpus = trainer.args, trainer.corpus
    num_parameters = sum(parameter.numel() for parameter in trainer.bare.parameters())
    print(
        f"{args.model} of {num_parameters / 1e6:.1f} M parameters"
        f"{'' if args.framework == 'torch' else ' on this rank'}, {args.dtype}, on "
        f"{trainer.num_ranks} x {trainer.device.type}; {corpus.name}: "
        f"{len(corpus.train) / 1e6:.1f} M tokens to train on"
    )
    if trainer.act:
        stats = trainer.act.stats()
        direct = "past" if stats.direct else "through"
        print(
            f"activations go to {', '.join(args.offload_path)} by {stats.io_engine} "
            f"({stats.io_engine_reason}), {direct} the page cache ({stats.direct_reason})"
        )


def first_problem(problem: str | None) -> str | None:
    """Return what is wrong on some rank, so that all ranks end together."""
    if not dist.is_initialized():
        return problem
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((each for each in problems if each), None)


def flag_of(error: OSError, args: argparse.Namespace) -> str:
    """Return the flag that named what cannot be used, and what it named."""
    name = str(error.filename or "")
    if name == args.plan:
        return f"--plan {name}"
    return f"{'--data' if name.startswith(args.data) else '--offload-path'} {name}"


def prepared(args: argparse.Namespace, resources: contextlib.ExitStack) -> tuple[Plan | None, Make]:
    """Return the plan of a run, and what makes its trainer once all ranks have come so far."""
    corpus = load_corpus(args.data, args.seq_len)
    if args.framework == "megatron":
        # Here, since the package is not needed otherwise.
        from megatron_trainer import MegatronTrainer, plan_of  # noqa: PLC0415

        own = plan_of(args)
        return own, lambda: MegatronTrainer(args, corpus, own, resources)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    plan = follow_plan(args, corpus.vocab_size, ranks)
    act = resources.enter_context(open_offload(args))
    return plan, lambda: Trainer(args, corpus, act)


def run(args: argparse.Namespace, command: str) -> int:
    """Set up, train and report; returns the exit status."""
    problem = missing_package(args.loader) or missing_framework(args.framework)
    with contextlib.ExitStack() as resources:
        plan, make = None, None
        try:
            if problem is None:
                plan, make = prepared(args, resources)
        except OSError as error:
            problem = f"{flag_of(error, args)}: {error.strerror}; or name another"
            if error.filename in ("io_uring", "posix"):
                problem = f"--io-engine {args.io_engine}: {error.strerror}; use --io-engine auto"
        except (ValueError, MemoryError) as error:
            problem = in_flags(str(error), args)
        if (problem := first_problem(problem)) or make is None:
            if dist.get_node_local_rank(fallback_rank=0) == 0:
                complain(problem or "another rank has no trainer")
            return 2
        trainer = make()
        if trainer.rank == 0:
            introduce(trainer)
        measured = train(trainer)
        stats = trainer.act.stats() if trainer.act else None
        predicted = plan.predicted if plan else None
        said = {"device_type": trainer.device.type, "framework": args.framework}
        summary = summarize(measured, stats, predicted, command=command, **said)
        if trainer.rank == 0:
            print(*conclusion(summary, measured, stats, args.memory_bytes), sep="\n")
            if args.summary:
                Path(args.summary).write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    return 0


def complain(problem: str) -> None:
    """Print the one line that says why the run ends."""
    print(f"train_gpt.py: error: {problem}", file=sys.stderr, flush=True)


def warn(message: Warning | str, *_where: object, **_line: object) -> None:
    """Print a warning as one line, above the progress bar; stands for `warnings.showwarning`."""
    tqdm.write(f"train_gpt.py: warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as `argv` says (None: the command line); returns the exit status."""
    args = parse_arguments(argv)
    command = ["python", *sys.argv] if argv is None else ["train_gpt.py", *argv]
    with warnings.catch_warnings(), joined_ranks() as num_ranks:
        warnings.showwarning = warn
        if num_ranks:
            command[:1] = ["torchrun", "--nproc_per_node", str(num_ranks)]
        try:
            return run(args, shlex.join(command))
        except KeyboardInterrupt:
            complain("interrupted")
            return 128 + signal.SIGINT
        except OSError as error:
            complain(str(error))
        except RuntimeError as error:
            if "by peer" not in str(error):  # in gloo's words for a rank that is gone
                raise
            complain("another rank has ended; its own line says why")
    return 1


if __name__ == "__main__":
    keep_freed_memory()
    leave(main())
