"""The main job: the same losses in every mode, and honest numbers about memory and time."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from offload import native

SUMMARY_KEYS = {
    "losses", "step_s", "tokens_per_s", "peak_activation_bytes", "peak_device_bytes",
    "peak_rss_bytes", "offloaded_bytes", "reloaded_bytes", "forwarded_bytes",
    "deduplicated_bytes", "kept_bytes", "stall_s", "ssd_write_bytes", "framework", "io_engine",
    "predicted", "versions", "command",
}  # fmt: skip

Summary = dict[str, Any]
Main = Callable[..., int]
Start = Callable[..., "subprocess.Popen[str]"]


def finished(child: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait for `child` to succeed; returns what it printed."""
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    return out, err


def summaries_of(
    start: Start, modes: dict[str, list[str]], folder: Path, *, num_ranks: int = 0
) -> dict[str, Summary]:
    """Train once in each mode, all at the same time; returns the summaries."""
    files = {mode: folder / f"{mode}.json" for mode in modes}
    children = [
        start(*flags, f"--summary={files[mode]}", num_ranks=num_ranks)
        for mode, flags in modes.items()
    ]
    for child in children:
        finished(child)
    return {mode: json.loads(file.read_text(encoding="utf-8")) for mode, file in files.items()}


def engines() -> list[str]:
    return [name for name, (works, _) in native.probe_engines().items() if works]


@pytest.fixture
def summary_of(main: Main, tmp_path: Path) -> Callable[..., Summary]:
    """Trains with the given flags and returns the summary."""

    def run(*arguments: str | Path) -> Summary:
        file = tmp_path / "summary.json"
        assert main(*arguments, f"--summary={file}") == 0
        summary: Summary = json.loads(file.read_text(encoding="utf-8"))
        return summary

    return run


# --- The numbers do not change --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_losses_are_the_same_to_the_bit_in_every_mode(
    dtype: str, start: Start, tmp_path: Path, spill_dir: Path
) -> None:
    same = [f"--dtype={dtype}", "--grad-accum=3", f"--offload-path={spill_dir}"]
    modes = {mode: [*same, f"--offload={mode}"] for mode in ("none", "recompute")}
    for engine in engines():
        modes[engine] = [*same, "--offload=ssd", f"--io-engine={engine}"]
    summaries = summaries_of(start, modes, tmp_path)
    losses = summaries["none"]["losses"]
    assert len(set(losses)) == 3
    for mode, summary in summaries.items():
        assert list(map(repr, summary["losses"])) == list(map(repr, losses)), mode
    for engine in engines():
        assert summaries[engine]["io_engine"] == engine
        assert summaries[engine]["offloaded_bytes"] > 0
        assert summaries[engine]["reloaded_bytes"] + summaries[engine]["forwarded_bytes"] > 0


@pytest.mark.parametrize("model", ["gpt", "bert", "t5", "llama"])
def test_every_model_has_the_same_losses_in_every_mode(
    model: str, start: Start, tmp_path: Path, spill_dir: Path
) -> None:
    same = [f"--model={model}", "--dropout=0.1", "--steps=5", f"--offload-path={spill_dir}"]
    modes = {mode: [*same, f"--offload={mode}"] for mode in ("none", "recompute", "ssd", "auto")}
    modes["auto, tight"] = [*modes["auto"], "--memory-bytes=200KiB"]
    summaries = summaries_of(start, modes, tmp_path)
    losses = summaries["none"]["losses"]
    assert len(set(losses)) == 5
    for mode, summary in summaries.items():
        assert list(map(repr, summary["losses"])) == list(map(repr, losses)), mode
    for mode in ("ssd", "auto", "auto, tight"):
        assert summaries[mode]["offloaded_bytes"] > 0, mode


def test_two_ranks_have_the_same_losses_with_and_without_offload(
    start: Start, tmp_path: Path, spill_dir: Path
) -> None:
    same = ["--grad-accum=3", f"--offload-path={spill_dir}"]
    modes = {mode: [*same, f"--offload={mode}"] for mode in ("none", "recompute", "ssd")}
    two = summaries_of(start, modes, tmp_path, num_ranks=2)
    losses = two["none"]["losses"]
    assert len(set(losses)) == 3
    assert two["recompute"]["losses"] == losses
    assert two["ssd"]["losses"] == losses
    assert two["ssd"]["offloaded_bytes"] > 0
    assert two["ssd"]["command"].startswith("torchrun --nproc_per_node 2 ")


def test_ranks_train_on_different_data_and_speak_once(start: Start, tmp_path: Path) -> None:
    children = [start(f"--summary={tmp_path / str(ranks)}", num_ranks=ranks) for ranks in (1, 2)]
    alone, together = (finished(child)[0] for child in children)
    assert alone.count("tokens to train on") == together.count("tokens to train on") == 1
    assert together.count("step 2: loss") == 1
    one, two = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in "12")
    # Before the first update the models are the same, so only the data can make a difference.
    assert one["losses"][0] != two["losses"][0]


def test_a_seed_decides_the_losses(summary_of: Callable[..., Summary]) -> None:
    first, again, other = (summary_of(f"--seed={seed}")["losses"] for seed in (3, 3, 4))
    assert first == again
    assert first[0] != other[0]


def test_a_full_spill_changes_no_loss_and_is_counted(
    summary_of: Callable[..., Summary], spill_dir: Path
) -> None:
    full = summary_of("--offload=ssd", f"--offload-path={spill_dir}", "--spill-bytes=256KiB")
    assert full["kept_bytes"] > 0
    assert full["offloaded_bytes"] > 0
    assert full["losses"] == summary_of("--offload=none")["losses"]


def test_training_on_text_lowers_the_loss(
    summary_of: Callable[..., Summary], tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    losses = summary_of(f"--data={text}", "--steps=25", "--lr=3e-3")["losses"]
    assert losses[-1] < 0.75 * losses[0]


def test_a_bin_file_of_large_tokens_is_trained_on(
    summary_of: Callable[..., Summary], tmp_path: Path
) -> None:
    tokens = np.random.default_rng(0).integers(40_000, size=4_000).astype("<u2")
    tokens.tofile(tmp_path / "tokens.bin")
    losses = summary_of(f"--data={tmp_path / 'tokens.bin'}")["losses"]
    assert losses[0] == pytest.approx(np.log(40_000), rel=0.05)  # as good as a guess


# --- What is reported -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "ssd"])
def test_the_summary_has_every_key_of_the_contract(
    mode: str, summary_of: Callable[..., Summary], spill_dir: Path
) -> None:
    summary = summary_of(f"--offload={mode}", f"--offload-path={spill_dir}")
    assert summary.keys() == SUMMARY_KEYS
    assert summary["framework"] == "torch"
    assert summary["predicted"] is None
    assert {"python", "torch", "offload"} <= summary["versions"].keys()
    assert f"--offload={mode}" in summary["command"]
    assert summary["step_s"] > 0
    assert summary["tokens_per_s"] == 4 * 64 / summary["step_s"]
    assert summary["peak_rss_bytes"] > summary["peak_device_bytes"]
    assert summary["peak_device_bytes"] > summary["peak_activation_bytes"] > 0
    if mode == "none":
        assert summary["io_engine"] is None
        assert summary["offloaded_bytes"] == summary["ssd_write_bytes"] == summary["stall_s"] == 0


def test_parameters_gradients_and_optimizer_are_the_difference_of_the_peaks(
    summary_of: Callable[..., Summary],
) -> None:
    summary = summary_of("--offload=none")
    block = 4 * 64 * 64 + 64 * 64 * 8 + (3 + 1 + 4 + 1) * 64 + 4 * 64
    num_parameters = 2 * 256 * 64 + 64 * 64 + 2 * block + 2 * 64
    num_tensors = 2 * 12 + 5
    # Parameter, gradient and two moments in fp32, and a step counter a tensor.
    resident = 16 * num_parameters + 4 * num_tensors
    assert summary["peak_device_bytes"] - summary["peak_activation_bytes"] == resident


def test_the_optimizers_states_may_lie_anywhere_with_the_same_losses(
    summary_of: Callable[..., Summary], spill_dir: Path
) -> None:
    runs = [
        summary_of("--steps=4", f"--offload-path={spill_dir}", *flags)
        for flags in (
            ("--optimizer=offload",),
            ("--optimizer=offload", "--optimizer-placement=ssd", "--staging-bytes=64MiB"),
            ("--optimizer=offload", "--optimizer-placement=host=0.5,nvme=0.5"),
            ("--optimizer=torch",),
        )
    ]
    assert runs[0]["losses"] == runs[1]["losses"] == runs[2]["losses"]
    assert runs[0]["losses"] == pytest.approx(runs[3]["losses"], rel=1e-4), "but for tails"


def test_ssd_and_recompute_need_less_memory_than_none(
    summary_of: Callable[..., Summary], spill_dir: Path
) -> None:
    shape = ("--layers=8", "--hidden=128", "--seq-len=128", "--micro-batch=8", "--eval-every=0")
    peaks = {
        mode: summary_of(*shape, f"--offload={mode}", f"--offload-path={spill_dir}")[
            "peak_activation_bytes"
        ]
        for mode in ("none", "recompute", "ssd")
    }
    assert peaks["ssd"] < 0.5 * peaks["none"]
    assert peaks["recompute"] < 0.5 * peaks["none"]


def test_one_step_is_enough_for_a_summary(summary_of: Callable[..., Summary]) -> None:
    summary = summary_of("--steps=1")
    assert len(summary["losses"]) == 1
    assert summary["step_s"] > 0
    assert summary["peak_activation_bytes"] > 0


def test_the_path_taken_is_said_once(
    main: Main, spill_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main("--offload=nvme", f"--offload-path={spill_dir}", "--io-engine=posix") == 0
    out = capfd.readouterr().out
    assert out.count(f"activations go to {spill_dir} by posix") == 1
    assert "step 2: loss" in out
    assert "step 3: loss" in out
    assert "validation" in out


# --- How it ends ----------------------------------------------------------------------------------


def test_the_process_ends_with_the_status_of_main(start: Start, tmp_path: Path) -> None:
    child = start("--offload=ssd", f"--offload-path={tmp_path / 'missing'}")
    out, err = child.communicate(timeout=100)
    assert child.returncode == 2
    assert not out
    assert "missing" in err


def test_two_ranks_complain_once(start: Start, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    children = [
        start("--offload=ssd", f"--offload-path={missing}", num_ranks=2),
        start("--offload=host", num_ranks=2),
    ]
    for child in children:
        _, err = child.communicate(timeout=100)
        assert child.returncode != 0
        assert err.count("train_gpt.py: error: ") == 1
        assert 'train_gpt.py", line' not in err  # a traceback of ours, beside torchrun's report


@pytest.mark.parametrize("model", ["gpt", "bert", "t5", "llama"])
def test_exact_tokens_have_nearly_the_losses_of_off_and_the_same_wherever_they_lie(
    main: Callable[..., int], tmp_path: Path, spill_dir: Path, model: str
) -> None:
    def losses(*flags: str) -> list[float]:
        file = tmp_path / "summary.json"
        assert main(f"--model={model}", f"--summary={file}", "--eval-every=0", *flags) == 0
        found: list[float] = json.loads(file.read_text())["losses"]
        return found

    exact = losses("--tokens=exact")
    assert exact == pytest.approx(losses(), rel=1e-5)
    moved = ["--offload=ssd", f"--offload-path={spill_dir}"]
    assert losses("--tokens=exact", *moved) == exact
    assert losses("--tokens=exact", "--offload=recompute") == exact


# --- The schedule ---------------------------------------------------------------------------------


def test_the_learning_rate_rises_then_falls_to_a_tenth(train_gpt: ModuleType) -> None:
    rates = [train_gpt.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert max(rates) == 1.0
    assert 0.1 <= rates[-1] < 0.101


def test_ctrl_c_ends_the_run_at_once_with_one_line(start: Start, spill_dir: Path) -> None:
    child = start(
        "--offload=ssd", f"--offload-path={spill_dir}", "--steps=100000", "--eval-every=2"
    )
    assert child.stdout is not None
    while "validation" not in (line := child.stdout.readline()) and line:
        pass
    child.send_signal(signal.SIGINT)
    _, rest = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGINT
    assert rest.splitlines()[-1] == "train_gpt.py: error: interrupted"
    assert "Traceback" not in rest
    assert "Exception ignored" not in rest
    assert list(spill_dir.iterdir()) == []
