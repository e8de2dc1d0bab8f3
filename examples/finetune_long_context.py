"""Fine-tune a causal model of Hugging Face's with LoRA on long text, in a fraction of the memory.

    python examples/finetune_long_context.py --model Qwen/Qwen2.5-0.5B --seq-len 32768 --offload ssd
    python examples/finetune_long_context.py --model config.json --seq-len 2048 --tokens off
    python examples/finetune_long_context.py --model config.json --tokens sparse --meter-steps 10

The loss is made in segments and perceptrons run in tiles (`--tokens exact`); attention is over the
blocks of tokens that matter to it, which is another loss (`--tokens sparse`); what is saved for the
backward goes to an SSD (`--offload ssd`). What is trained is an ordinary adapter of PEFT's.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from flags import Parser, at_least, byte_size, one_of
from heap import keep_freed_memory
from memory import StepMemory
from tqdm import tqdm

from offload import Session
from offload.native import inspect_directory
from perfmodel.token_plan import SparsityRule

MIB = 1 << 20
BYTES = 256
CHOOSING = ("sparse", "gradient")
"""Modes that choose tokens."""
ALWAYS_KEPT = SparsityRule().always_tokens
"""Tokens of a sequence that they always keep."""
WATCHED = 2
"""The step whose memory is counted: by then everything has been there once."""


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Parser]:
    """Read the command line; exits with status 2 and one line where it cannot be followed."""
    parser = Parser(
        prog="finetune_long_context.py",
        description="Fine-tune a causal model with LoRA on long text.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="a name or folder of a model, or a config.json: then bytes")
    add("--data", default="stdlib", help="stdlib, or a text file")
    add("--seq-len", type=at_least(2), default=8192, help="tokens in a sequence")
    add("--steps", type=at_least(1), default=20, help="optimizer steps, a sequence each")
    add("--lr", type=at_least(0, float), default=1e-4, help="learning rate")
    add("--rank", type=at_least(1), default=8, help="of the adapters, beside attention's maps")
    add("--dtype", type=one_of("fp32", "bf16"), default="fp32", help="of the model's weights")
    modes = one_of("off", "exact", *CHOOSING)
    said = "sparse: attention to those that matter; gradient: gradients through those"
    add("--tokens", type=modes, default="exact", help=said)
    add("--keep", type=share, metavar="RATIO", help="of a sequence, of those that matter (0.4)")
    add("--warm-up", type=at_least(0), default=0, help="first steps in which all tokens matter")
    add("--meter-steps", type=at_least(0), default=0, help="between looks at quality; 0: none")
    add("--offload", type=one_of("none", "ssd"), default="none", help="where saved tensors go")
    add("--offload-path", default="/var/tmp", metavar="DIR", help="on an SSD")
    add("--staging-bytes", type=byte_size, default="64MiB", help="memory on the way to the SSD")
    add("--checkpointing", action="store_true", help="run layers again, and move what enters them")
    add("--seed", type=at_least(0), default=0, help="of adapters, and of a config's first weights")
    add("--save", metavar="DIR", help="where the adapter goes")
    return parser.parse_known_flags(argv), parser


def share(text: str) -> float:
    """Return a share of something, over 0 and at most 1."""
    found = at_least(0, float)(text)
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not over 0 and at most 1")
    return float(found)


def plan_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the run does by a plan."""
    plan: dict[str, Any] = {"version": 1, "tokens": {"mode": args.tokens}}
    if args.tokens in CHOOSING:
        plan["tokens"]["sparse"] = {"ratio": args.keep or 0.4, "warm_up_steps": args.warm_up}
    if args.offload == "ssd":
        moved = {"mode": "ssd", "path": [args.offload_path], "staging_bytes": args.staging_bytes}
        plan["activations"] = moved
    return plan


def load(args: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """Return the model with its adapters, and all tokens of the text.

    Raises OSError for what cannot be read, ValueError for a text that is too short.
    """
    torch.manual_seed(args.seed)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    text = read_text(args.data)
    if args.model.endswith(".json"):
        if not Path(args.model).is_file():  # which would be asked for on the hub
            raise ValueError(f"--model {args.model} is no file here")
        config = transformers.AutoConfig.from_pretrained(args.model)
        if config.vocab_size < BYTES:
            raise ValueError(f"--model {args.model} has fewer than {BYTES} tokens, one a byte")
        models: Any = transformers.AutoModelForCausalLM
        model = models.from_config(config, dtype=dtype)
        tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if len(tokens) < args.seq_len:
        raise ValueError(f"--data {args.data} has {len(tokens)} tokens, and --seq-len is more")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", args.seq_len)
    if longest < args.seq_len:
        raise ValueError(f"--seq-len {args.seq_len}: the model has {longest} positions")
    model.config.use_cache = False
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    adapters = peft.LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, adapters).train(), tokens


def read_text(source: str) -> str:
    """Return a file's text, or that of Python's own standard library."""
    if source != "stdlib":
        return Path(source).read_text(encoding="utf-8")
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n".join(each.read_text("utf-8") for each in sorted(folder.glob("*.py")))


def sequences(tokens: torch.Tensor, length: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield [1, length], one behind the other, from the start again at the end."""
    while True:
        for begin in range(0, len(tokens) - length + 1, length):
            yield tokens[None, begin : begin + length].to(device)


def train(args: argparse.Namespace, model: Any, tokens: torch.Tensor) -> None:
    """Take the steps, and say what they took."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    rows = sequences(tokens, args.seq_len, device)
    peak_bytes = 0
    probe: torch.Tensor | None = None  # the first sequence, which the meter asks about
    with Session(model, plan_of(args)) as session, tqdm(total=args.steps, unit="step") as bar:
        for step in range(args.steps):
            memory = StepMemory(device)
            watched = step == min(WATCHED, args.steps - 1)
            with memory if watched else nullcontext():
                row = next(rows)
                probe = row if probe is None else probe
                with session.forward():
                    loss = model(input_ids=row, labels=row).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            stats = session.stats()
            if args.meter_steps and (step + 1) % args.meter_steps == 0:
                found = session.measure_quality({"input_ids": probe, "labels": probe})
                bar.write(f"step {step + 1}: {found.text()}")
            if watched:
                native = 0 if stats is None else stats.native_peak_bytes + stats.page_cache_bytes
                peak_bytes = memory.peak_bytes + (native if device.type == "cpu" else 0)
            shown = {"loss": f"{loss.item():.4f}"}
            if peak_bytes:
                shown["peak"] = f"{peak_bytes / MIB:,.0f}MiB"
            bar.set_postfix(shown, refresh=False)
            bar.update()
    moved = "" if stats is None else f"; {stats.offloaded_bytes / MIB:,.0f} MiB were offloaded"
    print(
        f"loss {loss.item():.4f} after {args.steps} steps of {args.seq_len} tokens; a step took "
        f"{peak_bytes / MIB:,.0f} MiB above what stays, at its worst moment{moved}"
    )
    if args.save:
        model.save_pretrained(args.save)
        print(f"the adapter is in {args.save}")


def main(argv: Sequence[str] | None = None) -> int:
    """Train as `argv` says (None: the command line); returns the exit status."""
    args, parser = parse_arguments(argv)
    try:
        of_sparse = {
            "--meter-steps": args.meter_steps,
            "--keep": args.keep,
            "--warm-up": args.warm_up,
        }
        for flag, value in of_sparse.items() if args.tokens not in CHOOSING else ():
            if value:
                raise ValueError(f"{flag} is about what --tokens sparse leaves out; give both")
        if args.tokens in CHOOSING and args.seq_len <= ALWAYS_KEPT:
            raise ValueError(
                f"--seq-len {args.seq_len} leaves nothing out with --tokens {args.tokens}, which "
                f"keeps first and last blocks; take more than {ALWAYS_KEPT}"
            )
        if args.offload == "ssd" and inspect_directory(args.offload_path).backing != "disk":
            raise ValueError(f"--offload-path {args.offload_path} is in RAM; name one on an SSD")
        if args.save and not os.access(Path(args.save).resolve().parent, os.W_OK):
            raise ValueError(f"--save {args.save} cannot be written; name a folder that can")
        train(args, *load(args))
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print(f"{parser.prog}: error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main())
