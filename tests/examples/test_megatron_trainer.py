"""`train_gpt.py --framework megatron`: the losses of no offload, on text and on Megatron's data."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core")

from perfmodel.cli import main as perfmodel
from tests.examples.conftest import ROOT, TINY
from tests.examples.test_flags import the_only_line

PROGRAM = Path(__file__).with_name("megatron_on_cpu.py")
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def trained(tmp_path: Path) -> Run:
    """Trains on so many ranks and returns the summary."""

    def run(*flags: str, ranks: int = 0) -> dict[str, Any]:
        file = tmp_path / "summary.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run(
            [
                *(sys.executable, *(torchrun if ranks else []), str(PROGRAM), *TINY),
                *("--framework=megatron", "--steps=2", f"--summary={file}", *flags),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        assert summary["framework"] == "megatron"
        return summary

    return run


def moved(spill_dir: Path) -> list[str]:
    """Return the flags with which all that can move goes to the SSD."""
    states = ["--optimizer=offload", "--optimizer-placement=ssd"]
    return ["--offload=ssd", f"--offload-path={spill_dir}", *states]


def test_losses_are_those_of_no_offload(trained: Run, spill_dir: Path) -> None:
    flags = ["--dtype=bf16", "--grad-accum=2", "--optimizer=offload"]
    kept = trained(*flags)
    assert kept["offloaded_bytes"] == 0
    assert kept["losses"][0] == pytest.approx(math.log(256), abs=0.5)  # of all micro-batches
    ours = trained(*flags, *moved(spill_dir))
    again = trained(*flags, "--offload=recompute")
    assert kept["losses"] == ours["losses"] == again["losses"]
    assert ours["offloaded_bytes"] > 0
    assert ours["peak_device_bytes"] > 0


def test_pipelines_and_llama_train_alike(trained: Run, spill_dir: Path) -> None:
    flags = ["--model=llama", "--pipeline-parallel=2", "--grad-accum=2", "--optimizer=offload"]
    kept = trained(*flags, ranks=2)
    assert trained(*flags, *moved(spill_dir), ranks=2)["losses"] == kept["losses"]


def test_a_dataset_of_megatrons_is_read_by_its_own_reader(trained: Run, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(1)
    builder = IndexedDatasetBuilder(str(tmp_path / "made.bin"), dtype=np.uint16)
    documents = [generator.integers(1, 300, size=size) for size in (3, 5000, 1, 8000)]
    for document in documents:
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "made.idx"))
    indexed = trained(f"--data={tmp_path / 'made.bin'}")
    # The same tokens without an index are the same training.
    np.concatenate(documents).astype("<u2").tofile(tmp_path / "plain.bin")
    assert trained(f"--data={tmp_path / 'plain.bin'}")["losses"] == indexed["losses"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--framework=megatron"], ["--framework megatron", "GPUs only"]),
        (["--engine=megatron"], ["--framework megatron", "GPUs only"]),
        (["--pipeline-parallel=2"], ["--pipeline-parallel", "--framework megatron"]),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    flags: list[str], named: list[str], main: Callable[..., int], capsys: Any
) -> None:
    assert main(*flags) == 2
    line = the_only_line(capsys.readouterr().err)
    for name in named:
        assert name in line


def test_an_index_that_is_none_is_said_in_a_line(
    main: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "bad.bin").write_bytes(b"12345678")
    (tmp_path / "bad.idx").write_bytes(b"nothing of the kind, and long enough for a header")
    assert main(f"--data={tmp_path / 'bad.bin'}") == 2
    assert "no index of Megatron's" in the_only_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tensor-parallel=3"], "which does not divide 1 ranks"),
        (["--model=bert"], "--model bert is not here"),
        (["--offload=auto"], "perfmodel plan --framework megatron"),
        (["--offload=host"], "there is none"),
        (["--plan=PLAN"], ", and the flags 4 sequences a step"),
        (["--plan=PLAN", "--grad-accum=4"], "num_layers is 32 in the plan and 2 here"),
    ],
)
def test_what_is_another_runs_is_refused_before_anything_is_built(
    flags: list[str], named: str, train_gpt: ModuleType, tmp_path: Path
) -> None:
    trainer = importlib.import_module("megatron_trainer")
    made = tmp_path / "plan.json"
    command = ["plan", "--model", "llama-2-7b", "--machine", "h100-sxm", "--seq-len", "64"]
    command += ["--micro-batch", "2", "--accumulation", "8", "--framework", "megatron"]
    assert perfmodel([*command, "--activations", "keep", "-o", str(made)]) == 0
    given = [each.replace("PLAN", str(made)) for each in flags]
    args = train_gpt.parse_arguments([*TINY, "--framework=megatron", *given])
    with pytest.raises(ValueError, match=re.escape(named)):
        trainer.plan_of(args)
