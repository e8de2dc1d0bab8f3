"""Trains a GPT by megatron-core on several ranks: the memory of all kept, run again, and moved.

`train_gpt.py --framework megatron` under torchrun, tensor and pipeline parallel, so that losses are
compared and memory is counted as its user sees them: on the first rank, whose stage holds most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import (
    ROOT,
    Claim,
    Record,
    add_record_arguments,
    exactly,
    positive,
    table,
    write_record,
)
from benchmarks.spill_directory import add_path_argument, spill_directory

MIB = 1 << 20
PARTS = ((1, 1), (2, 1), (1, 2), (2, 2))
"""Tensor by pipeline."""
MODES = ("none", "recompute", "ssd")
GOAL = 0.9
"""Of the memory of a step that keeps all, at most."""

Summaries = dict[str, dict[str, dict[str, Any]]]
"""By parts and mode."""


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_record_arguments(parser, warm_up=1)
    add_path_argument(parser)
    for flag, default in (
        ("--hidden", 512),
        ("--layers", 8),
        ("--seq-len", 256),
        ("--micro-batch", 4),
        ("--micro-batches", 4),
        ("--steps", 4),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"({default})")
    return parser.parse_args(), parser


def trained(mode: str, parts: tuple[int, int], sizes: list[str], directory: str) -> dict[str, Any]:
    """Return the summary of a run; raises RuntimeError with its words where it fails."""
    tensor, pipeline = parts
    # Without a GPU, the tests' stand-in for what megatron-core asks of CUDA.
    gpu = torch.cuda.is_available()
    script = "examples/train_gpt.py" if gpu else "tests/examples/megatron_on_cpu.py"
    states = ["--optimizer=offload", "--optimizer-placement=ssd", f"--offload-path={directory}"]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "summary.json"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *(f"--nproc_per_node={tensor * pipeline}", str(ROOT / script)),
                *("--framework=megatron", f"--offload={mode}", "--eval-every=0", *states, *sizes),
                *(f"--tensor-parallel={tensor}", f"--pipeline-parallel={pipeline}"),
                *("--staging-bytes=64MiB", "--seed=0"),
                f"--summary={file}",
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{mode} on {tensor} x {pipeline} ranks: {done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def counted(name: str, value: float, goal: float) -> Claim:
    """Return a claim on what is the same at every run."""
    return Claim(name=name, sense="at most", goal=goal, interval=exactly(value), exact=True)


def make_record(found: Summaries, settings: dict[str, object]) -> Record:
    """Put the figures and the claims together."""
    claims = []
    for parts, by_mode in found.items():
        none, again, ours = (by_mode[mode] for mode in MODES)
        peaks = [each["peak_activation_bytes"] for each in (none, again, ours)]
        losses = {tuple(each["losses"]) for each in by_mode.values()}
        claims += [
            counted(f"{parts}: memory, ours / none", peaks[2] / peaks[0], GOAL),
            counted(f"{parts}: losses that differ", len(losses) - 1, 0.0),
        ]
    return Record(
        claim="megatron-core on several ranks trains with the same losses in less memory",
        goal=f"at most {GOAL} of the memory of all kept, and not a bit of a loss else",
        claims=claims,
        value=max(each.interval.median for each in claims if each.interval and each.goal),
        floor=None,
        peers={},
        noise={},
        samples={
            parts: {
                mode: {
                    key: each[key]
                    for key in ("peak_activation_bytes", "step_s", "losses", "offloaded_bytes")
                }
                for mode, each in by_mode.items()
            }
            for parts, by_mode in found.items()
        },
        settings=settings,
    )


def main() -> None:
    """Measure and record; exits with 0 whether the goals are met or not."""
    arguments, parser = parse_arguments()
    given = {
        "hidden": arguments.hidden,
        "heads": max(1, arguments.hidden // 64),
        "layers": arguments.layers,
        "seq-len": arguments.seq_len,
        "micro-batch": arguments.micro_batch,
        "grad-accum": arguments.micro_batches,
        "steps": arguments.steps,
    }
    sizes = [f"--{key}={value}" for key, value in given.items()]
    found: Summaries = {}
    with spill_directory(arguments.path, parser) as directory:
        for parts, mode in tqdm([(each, mode) for each in PARTS for mode in MODES], desc="runs"):
            name = "tensor {} x pipeline {}".format(*parts)
            found.setdefault(name, {})[mode] = trained(mode, parts, sizes, directory)
    record = make_record(found, {**given})
    rows = [
        [f"{parts}, {mode}", f"{each['peak_activation_bytes'] / MIB:.0f}"]
        for parts, by_mode in found.items()
        for mode, each in by_mode.items()
    ]
    print(table(["", "MiB, rank 0"], rows), end="\n\n")
    write_record(record, arguments.json)


if __name__ == "__main__":
    main()
