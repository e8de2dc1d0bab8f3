"""Each benchmark, run as its users run it but tiny, writes a record that keeps the contract."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import activations, bandwidth, hooks, io, iterations, nine_cases, rok
from benchmarks.iterations_worker import Case
from benchmarks.record import ROOT, Interval, median_interval

CONTRACT = {
    *("claim", "goal", "value", "met", "peers", "floor", "machine", "versions", "commit"),
    *("command", "samples"),
}
PATH_FLAGS = {
    "io": "--path",
    "hooks": "--path",
    "states": "--path",
    "interleaved": "",
    "iterations": "",
    "pipelines": "",
}
ROUNDS = ["--pairs", "6", "--warm-up", "1"]
TINY_IO = ["--bytes", "2097152", "--tensor-bytes", "524288", "--block-bytes", "65536"]
TINY_GPT = [
    *("--layers", "2", "--hidden", "64", "--heads", "2", "--seq-len", "32"),
    *("--micro-batch", "2", "--threads", "1", "--min-tensor-bytes", "4096"),
]


def record_of(name: str, directory: Path, out: Path, *flags: str) -> dict[str, Any]:
    """Run a benchmark and check what every record has to have."""
    where = [PATH_FLAGS.get(name, "--offload-path"), str(directory)]
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *ROUNDS]
    command += ["--json", str(out), *(where if where[0] else []), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert set(found) >= CONTRACT
    assert found["command"].startswith(f"python benchmarks/{name}.py --pairs 6")
    assert str(ROOT) not in found["command"].split(" --json")[0]
    assert found["met"] in {True, False, None}
    verdicts = {None: "undecided", True: "met", False: "not met"}
    assert f"{found['claim']}: {verdicts[found['met']]}" in done.stdout
    assert all(claim["name"] in done.stdout for claim in found["claims"])
    assert not list(directory.iterdir()), "the benchmark left files behind"
    return found


def test_io_compares_in_pairs_and_decides_nothing_without_a_peer(
    spill_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("record") / "io.json"
    found = record_of("io", spill_dir, out, *TINY_IO, "--peers", "fio")
    assert found["met"] is None
    assert found["absent"]["aio"] == "not asked for"
    assert found["peers"]["aio write"] is None
    assert found["facts"]["ours"]["io_engine"] in {"uring", "posix"}
    for figures in found["samples"].values():
        assert {len(samples) for samples in figures.values()} == {6}
    assert {"ours", "ours again"} <= set(found["samples"])
    if shutil.which("fio") is None:
        assert found["absent"]["fio"] == "fio is not installed"
        return
    fio, ours = (found["samples"][name]["write_wall_s"] for name in ("fio", "ours"))
    expected = median_interval([their_s / our_s for their_s, our_s in zip(fio, ours, strict=True)])
    by_name = {claim["name"]: claim for claim in found["claims"]}
    assert Interval(**by_name["write bandwidth / fio"]["interval"]) == expected


def test_hooks_compares_every_length_with_an_identity_hook(
    spill_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("record") / "hooks.json"
    found = record_of("hooks", spill_dir, out, "--tensors", "50", "200")
    assert found["met"] in {True, False}
    assert set(found["samples"]) == {
        *("none", "identity", "passed through", "offloaded", "identity again", "none again"),
    }
    for by_length in found["samples"].values():
        assert {length: len(samples) for length, samples in by_length.items()} == {
            "50": 6,
            "200": 6,
        }
    assert len(found["claims"]) == 2 * 2 + 2


def test_activations_compares_bits_time_and_peak(
    spill_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("record") / "activations.json"
    sizes = [*TINY_GPT, "--staging-bytes", "8388608", "--restarts", "1"]
    found = record_of("activations", spill_dir, out, *sizes)
    assert found["met"] in {True, False}
    for name in ("none", "ssd", "auto", "recompute", "none again"):
        assert len(found["samples"][name]["step_s"]) == 6
    peaks = found["samples"]["peak_bytes"]
    assert peaks["none"] == peaks["none again"] > peaks["recompute"] > 0
    # Staging counts even where, as here, it dwarfs the activations.
    assert peaks["ssd"] > found["samples"]["peaks"]["ssd"]["native_peak_bytes"] > 0
    peak = next(claim for claim in found["claims"] if claim["name"] == "peak, ssd / none")
    assert peak["value"] == peaks["ssd"] / peaks["none"]


@pytest.mark.soak  # runs as activations and nine cases do, and their frame is tested there
def test_bandwidth_compares_parts_of_what_full_overlap_needs(
    spill_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("record")
    flags = (*TINY_GPT, "--staging-bytes", "8388608", "--picture", str(out / "bandwidth.png"))
    found = record_of("bandwidth", spill_dir, out / "bandwidth.json", *flags)
    assert found["met"] in {True, False}
    assert set(found["samples"]["peak_bytes"]) == {"none", "none again", "25%", "50%", "100%"}
    assert found["settings"]["needed_bytes_per_s"] > 0
    assert (out / "bandwidth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak  # the same
def test_rok_compares_what_fits_at_several_micro_batches(
    spill_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("record")
    flags = [*TINY_GPT, "--staging-bytes", "1048576", "--picture", str(out / "rok.png")]
    flags += ["--micro-batches", "2", "1", "--limit-bytes", "1000000000"]
    found = record_of("rok", spill_dir, out / "rok.json", *flags)
    assert list(found["samples"]) == ["1", "2"]
    peaks = found["samples"]["2"]["peaks"]
    assert peaks["none"] > peaks["recompute"] > 0
    assert (out / "rok.png").read_bytes().startswith(b"\x89PNG")


def test_nine_cases_compare_bits_time_and_peak_in_one_process(
    spill_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("record") / "nine_cases.json"
    flags = ["--device", "cpu", "--models", "gpt", "t5", "--sizes", "128x2", "--seq-len", "64"]
    flags += ["--micro-batch", "2", "--vocab", "256", "--staging-bytes", "1048576"]
    flags += ["--min-tensor-bytes", "4096"]
    found = record_of("nine_cases", spill_dir, out, *flags)
    assert found["met"] is None, "there is no host tier to judge without a GPU"
    assert {"gpt 128x2, host", "t5 128x2, trl"} <= set(found["absent"])
    for case in ("gpt 128x2", "t5 128x2"):
        steps, peaks = (found["samples"][case][key] for key in ("steps", "peak_bytes"))
        assert set(steps) == {"keep", "recompute", "ssd", "auto", "save_on_cpu", "keep again"}
        assert all(len(figures["step_s"]) == 6 for figures in steps.values())
        assert min(steps["ssd"]["offloaded_bytes"]) > 0
        assert peaks["keep"] == peaks["keep again"] > peaks["recompute"] > 0


def test_nine_cases_notice_a_mode_whose_gradients_differ_in_a_bit(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = nine_cases.Case(
        model="gpt",
        hidden=128,
        layers=1,
        seq_len=16,
        micro_batch=1,
        vocab=256,
        device="cpu",
        directory=str(spill_dir),
        staging_bytes=1 << 20,
        host_bytes=1 << 20,
        min_tensor_bytes=4096,
        auto_part=0.5,
    )
    with nine_cases.Turns(case) as turns:
        for mode in ("keep", "recompute"):
            turns.open(mode)
        nine_cases.require_same_bits(turns, ["keep", "recompute"])

        def nearly(layer: Any, *inputs: Any) -> Any:
            return layer(*inputs) * (1 + 2**-7)

        monkeypatch.setattr("benchmarks.case_modes.recompute", nearly)
        with pytest.raises(RuntimeError, match="recompute"):
            nine_cases.require_same_bits(turns, ["keep", "recompute"])


def test_iterations_hold_all_placements_to_the_same_losses_and_name_absent_peers(
    spill_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("record") / "iterations.json"
    flags = ["--device", "cpu", "--sizes", "128x2", "--seq-len", "32", "--vocab", "256"]
    flags += ["--modes", "ours", "ours, early gradients", "ours, half moves", "torchao"]
    found = record_of("iterations", spill_dir, out, *flags)
    assert found["met"] is None, "no peer was there"
    assert set(found["absent"]) == {"gpt 128x2, torchao"}
    losses = found["samples"]["gpt 128x2"]["losses"]
    first = losses.pop("ours")
    assert len(first) == 7, "one to warm up, six that count"
    assert set(losses) == {"ours, early gradients", "ours, half moves", "ours again"}
    assert all(each == first for each in losses.values())
    digests = [each["digest"] for each in found["facts"]["gpt 128x2"].values()]
    assert digests[0]
    assert all(each == digests[0] for each in digests)
    assert found["claims"][-1]["met"]


def test_iterations_notice_a_placement_with_other_losses() -> None:
    case = Case(hidden=8, layers=1, seq_len=8, micro_batch=1, vocab=8, device="cpu")
    found = iterations.Measured(case)
    names = ("ours", "ours, half moves", "torchao")
    found.losses = {name: [1.0, 2.0 + (name == "torchao")] for name in names}
    found.facts = {name: {"digest": [5, 7]} for name in (*names, "ours again")}
    assert iterations.claims_of(found)[-1].met
    found.losses["ours again"] = [1.0, 2.0000000000000004]
    assert iterations.claims_of(found)[-1].met is False
    found.losses["ours again"] = found.losses["ours"]
    found.facts["ours, half moves"] = {"digest": [5, 8]}
    assert iterations.claims_of(found)[-1].met is False
    found.facts["ours, half moves"] = {"digest": [5, 7]}
    assert iterations.claims_of(found)[-1].met
    found.absent["ours, all on the device"] = "out of memory"
    assert iterations.claims_of(found)[-1].met is None
    assert iterations.claims_of(iterations.Measured(case))[-1].met is None


def test_states_are_held_against_their_bytes_and_decide_nothing_without_peers(
    spill_dir: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no fio
    out = tmp_path_factory.mktemp("record") / "states.json"
    sizes = ("--params", "400000", "--tensor-params", "100000", "--subgroup-params", "100000")
    found = record_of("states", spill_dir, out, *sizes, "--staging-bytes", "16777216")
    assert found["absent"]["fio"] == "fio is not installed"
    assert {len(seconds) for name, seconds in found["samples"].items() if "ours" in name} == {6}
    assert found["facts"]["ours"]["memory_bytes"] <= 16777216


def test_interleaved_updates_are_held_against_their_prediction(
    spill_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("record") / "interleaved.json"
    sizes = ("--subgroups", "6", "--subgroup-params", "10000", "--slower", "2000")
    found = record_of("interleaved", spill_dir, out, *sizes)
    planned = found["facts"]["planned"]
    assert planned["step_s"] > 0
    assert set(planned["link_rates"]) == {"to the device", "to the host"}
    assert 0 <= planned["moved"] <= 1
    assert {len(seconds) for seconds in found["samples"].values()} == {6}


def test_what_fits_decides_which_micro_batches_are_compared() -> None:
    def point(micro_batch: int, peaks: dict[str, float], step_s: dict[str, float]) -> rok.Point:
        samples = {mode: {"step_s": [seconds] * 24} for mode, seconds in step_s.items()}
        return rok.Point(micro_batch, 100 * micro_batch, samples, peaks, 0.0)

    step_s = {"none": 1.0, "recompute": 1.3, "ssd": 1.0, "auto": 1.04}
    small = point(1, {"none": 90, "recompute": 30, "ssd": 40, "auto": 40}, step_s)
    large = point(2, {"none": 180, "recompute": 60, "ssd": 80, "auto": 80}, step_s)
    within = {mode: rok.largest_fitting([small, large], mode, 100) for mode in rok.MODES}
    assert within == {"none": small, "recompute": large, "ssd": large, "auto": large}
    first, second = rok.claims_of([small, large], 100)
    assert first.interval is not None
    assert first.interval.median == pytest.approx(200 / 1.04 / 100), "keep is the slowest"
    assert second.interval is not None
    assert second.interval.median == pytest.approx(1.25)
    assert second.met
    first, second = rok.claims_of([small, large], 50)
    assert second.interval is not None, "at micro-batch 1"
    first, second = rok.claims_of([small, large], 10)
    assert (first.met, second.met) == (None, None)


@pytest.mark.parametrize(
    ("program", "flags", "named"),
    [
        (io, ["--path", "/no/such/directory"], "/no/such/directory"),
        (io, ["--path", "/proc"], "/proc"),
        (io, ["--bytes", "1000"], "--bytes 1000"),
        (io, ["--block-bytes", "1000"], "--block-bytes 1000"),
        (io, ["--pairs", "0"], "'0'"),
        (io, ["--peers", "dd"], "'dd'"),
        (hooks, ["--path", "/no/such/directory"], "/no/such/directory"),
        (hooks, ["--tensors", "0"], "'0'"),
        (activations, ["--offload-path", "/no/such/directory"], "/no/such/directory"),
        (bandwidth, ["--heads", "3"], "--heads 3"),
        (rok, ["--micro-batches", "0"], "'0'"),
        (nine_cases, ["--device", "cpu", "--sizes", "64"], "'64'"),
        (iterations, ["--device", "cpu", "--sizes", "64x0"], "'64x0'"),
        (activations, ["--heads", "3"], "--heads 3"),
        (activations, ["--json", "/no/such/directory/a.json"], "/no/such/directory/a.json"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(
    program: ModuleType,
    flags: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_benchmark_that_is_told_to_end_leaves_nothing_behind(spill_dir: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "io.py"), "--path", str(spill_dir)]
    command += [*TINY_IO, "--peers", "--pairs", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = b""
        while b"rounds" not in said:  # the progress bar of the timed part
            piece = process.stderr.read(1)
            assert piece, said
            said += piece
        assert list(spill_dir.iterdir())
        process.terminate()
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(spill_dir.iterdir())


def recorded(program: str, out: Path, *flags: str) -> dict[str, Any]:
    """Run a benchmark for few rounds and return what it recorded."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{program}.py"), *ROUNDS, *flags]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert set(found) >= CONTRACT
    return found


def test_planning_tells_its_seconds_at_each_bandwidth(tmp_path: Path) -> None:
    found = recorded("planning", tmp_path / "planning.json", "--tensors", "100")
    assert len(found["claims"]) == 3
    assert {len(samples) for samples in found["samples"].values()} == {6}


def test_planner_speed_tells_the_seconds_of_plans_and_of_many_strategies(tmp_path: Path) -> None:
    flags = ("--cases", "1", "--fine", "1")
    found = recorded("planner_speed", tmp_path / "planner_speed.json", *flags)
    assert found["met"] is False, "so few shares are no hundred thousand strategies"
    assert found["facts"]["imports_torch"] is False
    for key in ("wall_s", "processor_s"):
        [taken_s] = found["samples"][key].values()
        assert len(taken_s) == 6
        assert min(taken_s) > 0
    assert len(found["samples"]["many_s"]) == 6
    by_name = {claim["name"]: claim for claim in found["claims"]}
    assert by_name["strategies tried"]["value"] == found["facts"]["tried"] > 100


def test_adam_compares_bits_and_speed_with_a_pass_over_the_same_bytes(tmp_path: Path) -> None:
    found = recorded("adam", tmp_path / "adam.json", "--parameters", "10000")
    assert {"ours", "floor", "torch", "ours again"} <= set(found["samples"])
    assert ("deepspeed" in found["samples"]) is not ("deepspeed" in found["absent"])
    assert found["facts"]["adam_path"] in {"avx512", "avx2", "scalar"}


def test_published_iterations_are_predicted(tmp_path: Path) -> None:
    found = recorded("published_iterations", tmp_path / "published_iterations.json")
    assert found["met"] is True
    assert all(len(each["iteration"]) == 2 for each in found["samples"].values())
