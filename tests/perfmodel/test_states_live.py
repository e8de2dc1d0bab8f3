"""Bytes of model states, as predicted from shapes, against those of live models and optimizers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from examples.memory import resident_bytes
from examples.models import MODELS, ModelConfig, call
from offload.device.emulated_updates import EmulatedUpdates
from perfmodel.plain_models import PLAIN_MODELS, plain_model
from perfmodel.plan import OptimizerConfig
from perfmodel.states import Held, held, held_bytes
from perfmodel.workload import Parallel, Strategy, Workload

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 256,
    "num_heads": 4,
    "seq_len": 64,
    "vocab_size": 2048,
}
SETTINGS: dict[str, Any] = {"subgroup_params": 200_000, "staging_bytes": 8 << 20}
PLACEMENTS = ("host", "device", "ssd", "host=0.4,ssd=0.6", "device=0.3,host=0.3,ssd=0.4")


def live(kind: str, dtype: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind](ModelConfig(**SIZES), call).to(getattr(torch, dtype))


def described(kind: str, dtype: str) -> Workload:
    return Workload(model=plain_model(kind, **SIZES), seq_len=64, dtype=dtype, plain=kind)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    """Take some steps and run another backward."""
    for step in range(steps + 1):
        optimizer.zero_grad()
        tokens = torch.randint(SIZES["vocab_size"], (2, SIZES["seq_len"] + 1))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        if step < steps:
            optimizer.step()


def measured(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return what stays, with gradients that were taken and lie where they were made."""
    taken = 0
    if isinstance(optimizer, offload.AdamW):
        taken = sum(each.nbytes for each in optimizer._gradients._held.values())
    return resident_bytes(model, optimizer) + taken


def in_memory(items: tuple[Held, ...]) -> int:
    return held_bytes(items, "device") + held_bytes(items, "host")


def staging_is_whole(optimizer: offload.AdamW) -> bool:
    """Say whether all staging is in memory: io_uring has it registered, else it is as touched."""
    tier = optimizer._placement._tier
    return tier is None or tier.facts().registered_buffers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_torchs_states_are_predicted_to_the_byte(kind: str, dtype: str) -> None:
    model = live(kind, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train(model, optimizer)
    found = held(described(kind, dtype), Strategy(optimizer="torch"), device_is_host=True)
    assert measured(model, optimizer) == in_memory(found)


@pytest.mark.parametrize(("dtype", "early"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_states_without_a_device_are_predicted_to_the_byte(
    placement: str, dtype: str, *, early: bool, spill_dir: Path
) -> None:
    model = live("gpt", dtype)
    path = spill_dir if "ssd" in placement else ()
    optimizer = offload.AdamW(
        model.parameters(), placement=placement, path=path, early_gradients=early, **SETTINGS
    )
    train(model, optimizer)
    strategy = Strategy(placement=placement, early_gradients=early)
    config = OptimizerConfig(**SETTINGS)
    found = held(described("gpt", dtype), strategy, device_is_host=True, settings=config)
    assert measured(model, optimizer) <= in_memory(found)
    if staging_is_whole(optimizer):
        assert measured(model, optimizer) == in_memory(found)
    counters = optimizer._placement.counters()
    on_ssd = sum(each.nbytes for each in found if each.name == "optimizer states")
    on_ssd -= sum(state.memory_bytes() for _, state in optimizer._subgroups)
    # One version lies there between steps, in whole pages.
    assert on_ssd <= counters["spill_used_bytes"] <= on_ssd + 4096 * len(optimizer._subgroups)
    assert 2 * counters["spill_used_bytes"] == held_bytes(found, "ssd")
    assert counters["spill_peak_used_bytes"] <= held_bytes(found, "ssd")
    optimizer.close()


@pytest.mark.parametrize(
    ("early", "schedule", "settings"),
    [
        (False, "host", {}),
        (True, "device", {}),
        (True, "host", {"gradient_bytes": 3 << 20}),
    ],
)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_states_beside_a_device_are_predicted_to_the_byte(
    placement: str, schedule: str, settings: dict[str, Any], *, early: bool, spill_dir: Path
) -> None:
    dtype = "bfloat16" if early else "float32"
    model = live("llama", dtype)
    device = EmulatedUpdates()
    path = spill_dir if "ssd" in placement else ()
    optimizer = offload.AdamW(
        model.parameters(),
        placement=placement,
        path=path,
        early_gradients=early,
        update_schedule=schedule,
        emulated_device=device,
        **SETTINGS,
        **settings,
    )
    train(model, optimizer)
    strategy = Strategy(placement=placement, early_gradients=early, update_schedule=schedule)
    config = OptimizerConfig(**SETTINGS, **settings)
    found = held(described("llama", dtype), strategy, settings=config)
    assert measured(model, optimizer) <= in_memory(found)
    if staging_is_whole(optimizer):
        assert measured(model, optimizer) == in_memory(found)
    pinned = sum(each.nbytes for each in found if each.pinned)
    assert sum(device.pinned.values()) == pinned
    optimizer.close()
    device.close()


@pytest.mark.parametrize("schedule", ["share=0.5", "stride=2", "auto"])
def test_what_a_schedule_moves_is_predicted_to_a_part(schedule: str) -> None:
    # Which gradients leave is known only to whoever has the subgroups: here as a share of all.
    model, device = live("gpt", "bfloat16"), EmulatedUpdates()
    optimizer = offload.AdamW(
        model.parameters(),
        placement="host",
        update_schedule=schedule,
        emulated_device=device,
        **SETTINGS,
    )
    train(model, optimizer)
    found = held(
        described("gpt", "bfloat16"),
        Strategy(placement="host", update_schedule=schedule),
        settings=OptimizerConfig(**SETTINGS),
    )
    copies = sum(each.nbytes for each in found if each.name == "gradient copies")
    beside = in_memory(found) - copies
    assert beside <= measured(model, optimizer) <= beside + copies
    optimizer.close()
    device.close()


# ---- DeepSpeed -----------------------------------------------------------------------------------


def zero_ranks(stage: int, dtype: str, kind: str, accumulation: int) -> list[dict[str, int]]:
    """Return what each of two ranks says that it holds."""
    pytest.importorskip("deepspeed")
    program = Path(__file__).with_name("zero_ranks.py")
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *run, str(program), str(stage), dtype, kind, str(accumulation)]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("held ")]
    assert len(lines) == 2
    return [json.loads(line.removeprefix("held ")) for line in lines]


@pytest.mark.parametrize(
    ("stage", "dtype", "kind", "accumulation"),
    [
        (1, "float32", "gpt", 2),
        (2, "bfloat16", "gpt", 1),
        (3, "bfloat16", "t5", 1),
    ],
)
def test_deepspeeds_ranks_hold_what_is_predicted(
    stage: int, dtype: str, kind: str, accumulation: int
) -> None:
    ranks = zero_ranks(stage, dtype, kind, accumulation)
    model = plain_model(kind, num_layers=2, hidden_size=96, num_heads=4, seq_len=64, vocab_size=512)
    workload = Workload(
        model=model,
        seq_len=64,
        dtype=dtype,
        framework="deepspeed",
        accumulation=accumulation,
        parallel=Parallel(data=2, zero_stage=stage),
    )
    found = held(workload, Strategy(optimizer="torch"), device_is_host=True)
    # Losses, norms and counters come to less than a thousand bytes.
    few = 1000

    def most(key: str) -> int:
        return max(rank[key] for rank in ranks)

    def named(*names: str) -> int:
        return sum(each.nbytes for each in found if each.name in names)

    states = named("optimizer states")
    assert most("moments") + most("masters") == states
    assert 0 <= most("last backward") - held_bytes(found, "device") < few
    # Between steps there is everything but gradients; ZeRO-3 has their place as well.
    gradients = 0 if stage == 3 else named("gradients")
    assert 0 <= most("stepped") - (held_bytes(found, "device") - gradients) < few
    if stage == 1 and accumulation > 1:  # until the last backward nothing is reduced
        backward = held_bytes(found, "device", "backward")
        assert 0 <= most("early backward") - backward < few
    update = held_bytes(found, "device", "update") - held_bytes(found, "device")
    # gloo gathers updated parameters by a copy of all of them.
    gathered = named("parameters") if stage < 3 else 0
    assert 0 <= most("update") - max(update, gathered) < few
