"""What a rank of DeepSpeed's ZeRO holds of a small model; run by test_states_live.py.

Takes a stage, a type, a model and how many backwards a step has. Prints the bytes of every tensor
that is alive in this rank, after a step and after the backwards of another one, of those of the
optimizer, and what the step needs above that.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

import deepspeed
import deepspeed.ops
import torch

from examples.memory import StepMemory
from examples.models import MODELS, ModelConfig, call

SIZES = {
    "num_layers": 2,
    "hidden_size": 96,
    "num_heads": 4,
    "seq_len": 64,
    "vocab_size": 512,
}


def live_bytes() -> int:
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for each in (thing, thing.grad if thing.is_leaf else None):
                if each is not None and each.device.type == "cpu":
                    storage = each.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def config_of(stage: int, dtype: str, accumulation: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1_000_000,
        "gradient_accumulation_steps": accumulation,
        "zero_allow_untested_optimizer": True,
        # Nothing stays gathered between steps.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == "bfloat16"},
    }


def main() -> None:
    stage, dtype, kind, accumulation = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    # Would be compiled for half a minute; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    before = live_bytes()
    model = MODELS[kind](ModelConfig(**SIZES), call)
    # Fused: without temporary copies of its own.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    config = config_of(stage, dtype, accumulation)
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    found = {}
    for _ in range(2):
        for _ in range(accumulation):
            tokens = torch.randint(SIZES["vocab_size"], (1, SIZES["seq_len"] + 1))
            loss = engine(tokens[:, :-1], tokens[:, 1:])
            engine.backward(loss)
            found["backward"] = max(found.get("backward", 0), live_bytes() - before)
            if not engine.is_gradient_accumulation_boundary():
                found["early backward"] = live_bytes() - before
            else:
                found["last backward"] = live_bytes() - before
                with StepMemory() as memory:
                    engine.step()
                continue
            engine.step()
        found["stepped"] = live_bytes() - before
    found["update"] = memory.peak_bytes
    states = engine.optimizer.optimizer.state
    found["moments"] = sum(
        each.nbytes for state in states.values() for each in state.values() if each.dim()
    )
    found["masters"] = sum(each.nbytes for each in states)
    # In one write each: lines of two ranks do not mix.
    os.write(1, f"held {json.dumps(found)}\n".encode())
    sys.stdout.flush()
    os._exit(0)  # threads of gloo outlive the group


if __name__ == "__main__":
    main()
