"""Trains with Hugging Face's Trainer: what the tests start, for all of their cases at once.

Reads {"cases": {name: case}} and writes {name: {"losses", "parameters", ...}}. A case has `model`,
`plan` (None: the Trainer itself), `lora`, `deepspeed` (its config), `arguments` (the Trainer's),
`callback` (whether the plan is a callback's), `resume` (a checkpoint's folder).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainingArguments

import offload
from offload.integrations.transformers import (
    OffloadCallback,
    Offloading,
    OffloadTrainer,
    _unwrapped,
)

VOCAB, LENGTH, ROWS = 64, 32, 24


STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1}
SETTINGS = {
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
}


def model_of(kind: str) -> Any:
    """Return a tiny model from a config."""
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        return transformers.LlamaForCausalLM(config)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def with_lora(model: Any, kind: str) -> Any:
    """Return the model with adapters beside its attention."""
    import peft

    targets = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "t5": ["q", "v"]}[kind]
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))


def tuned(case: dict[str, Any], directory: str) -> dict[str, Any]:
    """Train with TRL's SFTTrainer; return what `trained` does."""
    import datasets
    import tokenizers
    import trl

    class Tuner(Offloading, trl.SFTTrainer):  # type: ignore[misc, name-defined]
        """SFTTrainer by a plan."""

    words = {f"w{number}": number for number in range(VOCAB)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="w0", eos_token="w1"
    )
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(2, VOCAB, (ROWS, LENGTH), generator=generator)
    model = model_of(case["model"])
    arguments = trl.SFTConfig(
        output_dir=directory,
        max_length=LENGTH,
        **STEPS,
        **{**SETTINGS, **case.get("arguments", {})},
    )
    trainer = Tuner(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": tokens.tolist()}),
        processing_class=tokenizer,
        plan=case["plan"],
    )
    trainer.train()
    return came_to(trainer, model, directory)


def trained(case: dict[str, Any], directory: str) -> dict[str, Any]:
    """Train; return the losses that were logged, and hashes of what came of it."""
    if case.get("sft"):
        return tuned(case, directory)
    model = model_of(case["model"])
    if case.get("lora"):
        model = with_lora(model, case["model"])
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, VOCAB, (ROWS, LENGTH), generator=generator)
    arguments = TrainingArguments(
        **{
            "output_dir": directory,
            **STEPS,
            **SETTINGS,
            "deepspeed": case.get("deepspeed"),
            "use_cpu": not case.get("deepspeed"),  # with which accelerate leaves DeepSpeed out
            **case.get("arguments", {}),
        }
    )
    given: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": [{"input_ids": row, "labels": row} for row in tokens],
    }
    plan = case.get("plan")
    if case.get("path of rank"):  # of all directories that are named, each rank its own
        own = plan[case["path of rank"]]
        own["path"] = [own["path"][int(os.environ["RANK"])]]
    if case.get("cls"):
        given["optimizer_cls_and_kwargs"] = (torch.optim.SGD, {"lr": 1.0})
    if plan is None:
        if case.get("ours"):  # the same AdamW, and nothing moves
            given["optimizers"] = (offload.AdamW(_groups(model), lr=1e-3, placement="device"), None)
        trainer = Trainer(**given)
    elif case.get("callback"):
        if case.get("ours"):
            given["optimizers"] = (offload.AdamW(_groups(model), lr=1e-3, placement="device"), None)
        trainer = Trainer(**given, callbacks=[OffloadCallback(plan)])
    else:
        if case.get("ours"):
            given["optimizers"] = (offload.AdamW(_groups(model), lr=1e-3, placement="device"), None)
        trainer = OffloadTrainer(**given, plan=plan)
    trainer.train(resume_from_checkpoint=case.get("resume"))
    return came_to(trainer, model, directory)


def came_to(trainer: Any, model: Any, directory: str) -> dict[str, Any]:
    """Return losses and norms, the last log, the files, and a hash of the parameters."""
    logs = [each for each in trainer.state.log_history if "loss" in each]
    found: dict[str, Any] = {
        "losses": [(each["loss"], each["grad_norm"]) for each in logs],
        "logs": logs[-1] if logs else {},
        "quality": [each for each in trainer.state.log_history if "dense_loss" in each],
        "optimizer": type(_unwrapped(trainer.optimizer)).__name__,
        "deepspeed": trainer.is_deepspeed_enabled,
        "files": sorted(str(each.relative_to(directory)) for each in Path(directory).rglob("*")),
    }
    bits = hashlib.sha256()
    for param in model.parameters():
        bits.update(param.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found | {"parameters": bits.hexdigest()}


def _groups(model: Any) -> Any:
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    return [
        {"params": [each for name, each in named if name in decaying], "weight_decay": 0.1},
        {"params": [each for name, each in named if name not in decaying], "weight_decay": 0.0},
    ]


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if os.environ.get("DS_ACCELERATOR"):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found: dict[str, Any] = {}
    for number, (name, case) in enumerate(json.loads(arguments.cases.read_text()).items()):
        try:
            directory = case.get("directory") or str(arguments.out.parent / f"out{number}")
            found[name] = trained(case, directory)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            found[name]["trace"] = traceback.format_exc()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank = f".{os.environ['RANK']}" if ranks > 1 else ""
    Path(f"{arguments.out}{rank}").write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
