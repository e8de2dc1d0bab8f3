"""The commands from their arguments to what is printed; whatever is wrong is one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perfmodel.cli import COMMANDS, main
from perfmodel.known_models import known_models
from perfmodel.machine import known_machines, read_machine
from tests.perfmodel.said import BATCH, PLAN, SMALL, said

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
}


# ---- plan ------------------------------------------------------------------------------------


def test_a_plan_says_what_for_and_a_row_for_each_choice(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, *PLAN, "--accumulation", "3").splitlines()
    for part in ("gpt", "parameters", "rtx-4090", "1,536 tokens a step"):
        assert part in lines[0]
    assert lines[2].split()[:3] == ["choice", "activations", "states"]
    for part in ("memory of a rank", "a step", "busy", "bottleneck"):
        assert any(line.startswith(part) for line in lines), part


def test_what_is_printed_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, *PLAN).isascii()


def test_the_memory_that_is_listed_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, *PLAN, "--json"))["choices"][0]
    for tier, key in (("host", "host_bytes"), ("ssd", "ssd_bytes")):
        by_phase: dict[str, int] = {"": 0, "backward": 0, "update": 0}
        for each in found["held"]:
            by_phase[each["phase"]] += each["nbytes"] if each["tier"] == tier else 0
        assert found[key] == by_phase[""] + max(by_phase["backward"], by_phase["update"])
    assert sum(found["parts_s"].values()) == pytest.approx(found["step_s"])


def test_ways_to_share_the_work_are_tried_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "gpt2-xl", "--machine", "a100-80gb-sxm", "--seq-len", "1024"]
    words += ["--micro-batch", "1", "--global-batch", "32", "--gpus", "8"]
    found = json.loads(
        said(capsys, *words, "--zero-stages", "0,1,3", "--pipelines", "1,2,4", "--json")
    )
    alone = json.loads(said(capsys, *words, "--json"))
    assert found["tried"] > alone["tried"]
    assert found["choices"][0]["step_s"] <= alone["choices"][0]["step_s"]
    lines = said(capsys, *words, "--zero-stages", "3").splitlines()
    assert "ranks" in lines[2]
    assert any("ZeRO-3" in each for each in lines[3:6])
    for wrong in (["--zero-stages", "4"], ["--pipelines", "0"]):
        assert wrong[0] in said(capsys, *words, *wrong, status=2)


@pytest.mark.parametrize("kind", ["deepspeed", "megatron", "transformers"])
def test_only_what_a_framework_can_be_told_is_chosen_from(
    capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    # On this device some layers are run again, and states shared out, where nobody says otherwise.
    words = ["plan", "--machine", "h100-sxm", "--seq-len", "4096", "--micro-batch", "8"]
    words += ["--model", "llama-2-7b", "--gpus", "8", "--device-memory", "75GiB"]
    zero = [] if kind == "transformers" else ["--zero-stage", "1"]
    assert said(capsys, *words, *zero, "--path", "/nvme", "--emit", kind)
    shared = said(capsys, *words, "--tensor", "2", "--emit", "transformers", status=2)
    assert "tensor=2: a Trainer's ranks share data alone" in shared


def test_a_plan_for_the_ssd_needs_its_directories(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    words = [*PLAN, "--activations", "ssd", "-o", str(path)]
    assert "--path is missing" in said(capsys, *words, status=2)
    assert not path.exists()


@pytest.mark.parametrize("kind", ["deepspeed", "megatron", "transformers"])
def test_the_best_is_printed_as_a_framework_takes_it(
    capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    ranks = ["--gpus", "2", "--zero-stage", "1"] if kind != "transformers" else []
    words = ["plan", "--model", "gpt2", "--machine", "h100-sxm", "--seq-len", "512"]
    states = ["--placement", "device", "--activations", "keep,recompute"]
    if kind == "megatron":
        words[2] = "llama-2-7b"
        ranks = ["--gpus", "8", "--tensor", "8"]
    out = said(capsys, *words, "--micro-batch", "2", *ranks, *states, "--emit", kind)
    if kind == "megatron":
        assert "--micro-batch-size" in out.split()
    else:
        assert json.loads(out)["train_micro_batch_size_per_gpu" if kind == "deepspeed" else "bf16"]


def test_nothing_fits_is_another_status_and_says_what_would_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", "--model", "llama-3-70b", "--machine", "laptop", *BATCH]
    err = said(capsys, *words, status=3)
    assert err.startswith("perfmodel: nothing fits")
    assert len(err.splitlines()) == 1
    assert main([*words, "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["choices"] == []
    assert found["change"]


# ---- the others ------------------------------------------------------------------------------


def test_simulating_without_ranks_that_share_data_has_one_of_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["simulate", "--model", "llama-3-8b", "--machine", "h100-sxm", "--seq-len", "4096"]
    words += ["--global-batch", "8", "--micro-batch", "1"]
    assert said(capsys, *words) == said(capsys, *words, "--data", "1")


def test_simulating_has_a_row_for_each_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--model", "llama-3-8b", "--machine", "h100-sxm", "--seq-len", "2048"]
    words += ["--tensor", "4", "--pipeline", "4", "--data", "2", "--global-batch", "32"]
    found = json.loads(said(capsys, *words, "--micro-batch", "1,2", "--json"))
    assert [each["micro_batch"] for each in found] == [1, 2]
    assert [each["bubble_share"] for each in found] == [3 / 16, 3 / 8]
    lines = said(capsys, *words, "--micro-batch", "1,2").splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["1", "2"]
    assert "global_batch=32" in said(capsys, *words, "--micro-batch", "3", status=2)


def test_what_may_be_written_in_a_day_is_offered_as_the_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*PLAN, "--placement", "ssd", "--ssd-write-bytes-per-day"]
    err = said(capsys, *words, "1GB", status=3)
    assert "of writes to the SSD a day (now 954 MiB)" in err
    needed = err.split("it would fit with ")[1].split(" of writes")[0].replace(" ", "")
    number, unit = needed[:-3], needed[-3:]
    assert said(capsys, *words, f"{float(number) * 1.01:.2f}{unit}")


def test_a_known_machine_is_printed_to_be_edited(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(said(capsys, "machines", "rtx-4090"))
    assert read_machine(str(file)) == read_machine("rtx-4090")
    assert "did you mean 'laptop'" in said(capsys, "machines", "latop", status=2)


def test_what_need_not_move_is_said_to_stay(capsys: pytest.CaptureFixture[str]) -> None:
    assert "none has to go to the ssd" in said(capsys, *PLAN, "--activations", "ssd")


def test_validation_ends_in_medians(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "validate")
    assert out.isascii()
    assert "median error" in out
    assert "no folder" in said(capsys, "validate", "--records", "nowhere", status=2)


def test_what_is_known_by_name_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for command, names in (("models", known_models()), ("machines", known_machines())):
        first = [line.split()[0] for line in said(capsys, command).splitlines()]
        assert {*names} <= {*first}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert f"perfmodel {command}" in said(capsys, command, "--help")
    assert command in said(capsys, "--help")


# ---- what is wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command"),
        (["plna"], "did you mean 'plan'"),
        (["plan", "--modle", "gpt2"], "did you mean '--model'"),
        (["plan", "--machine", "latop", *SMALL, *BATCH], "did you mean 'laptop'"),
        (["plan", "--model", "lama-3-8b", "--machine", "laptop", *BATCH], "'llama-3-8b'"),
        (
            ["plan", "--model", "/nowhere/config.json", "--machine", "laptop"],
            "/nowhere/config.json",
        ),
        (["plan", "--model", "gpt2", "--machine", "laptop", "--seq-len", "8"], "--micro-batch is"),
        ([*PLAN, "--device-memory", "40Gb"], "'40Gb' is not a size"),
        ([*PLAN, "--device-memory", f"{'9' * 400}.0"], "more than 30 digits"),
        ([*PLAN, "--pipelines", "2", "--gpus", "2"], "share data alone"),
        ([*PLAN, "--lora-rank", "99999999"], "lora_rank=99999999 is more than the 256 channels"),
        ([*PLAN, "--zero-stage", "1", "--zero-stages", "2"], "say the same"),
        ([*PLAN, "--device-memory", "1MiB"], "--device-memory of 1.00 MiB is below"),
        ([*PLAN, "--emit", "megatron", "--framework", "torch"], "does not go with"),
        ([*PLAN, "-o", "chart.svg"], "--sweep"),
        ([*PLAN, "-o", "/nowhere/plan.json", "--path", "x"], "/nowhere/plan.json"),
        ([*PLAN, "--sweep", "seq-len=1:2"], "say the same"),
        ([*PLAN, "--sweep", "seq_len=1:2"], "did you mean 'seq-len'"),
        ([*PLAN, "--sweep", "seq-len=9:2"], "is not KEY=LOW:HIGH"),
        ([*PLAN, "--optimizer", "torch"], "--optimizer torch is for --dtype float32"),
        ([*PLAN, "--dtype", "bf16"], "did you mean 'bfloat16'"),
        (["predict", "/nowhere", "--machine", "laptop"], "/nowhere"),
    ],
)
def test_a_wrong_argument_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    err = said(capsys, *words, status=2)
    assert err.startswith("perfmodel: error: ")
    assert len(err.splitlines()) == 1
    assert message in err


def test_a_machine_without_a_drive_has_no_ssd(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps({**read_machine("laptop").to_json(), "drive": None}))
    words = ["plan", *SMALL, *BATCH, "--machine", str(machine)]
    for asked in (["--placement", "ssd"], ["--activations", "keep,ssd"], ["--path", "/nvme"]):
        assert "no drive" in said(capsys, *words, *asked, status=2)
    assert said(capsys, *words)


def quietly(words: list[str]) -> int:
    """Return the status; whatever is not one is an exception."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(words)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | st.text(max_size=4),
    lambda each: (
        st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=4), each, max_size=2)
    ),
    max_leaves=4,
)
KEYS = st.sampled_from([*CONFIG, "num_key_value_heads", "head_dim", "hidden_act", "attention_bias"])
FUZZ = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(changes=st.dictionaries(KEYS, JSON, max_size=3))
def test_no_config_makes_a_traceback(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | changes))
    words = ["plan", "--model", str(path), "--machine", "laptop", "--activations", "keep"]
    assert quietly([*words, "--seq-len", "16", "--micro-batch", "1"]) in (0, 2, 3)


@FUZZ
@given(part=st.sampled_from(["", "device", "host", "link", "drive"]), data=st.data(), value=JSON)
def test_no_machine_makes_a_traceback(
    tmp_path: Path, part: str, data: st.DataObject, value: Any
) -> None:
    machine = read_machine("laptop").to_json()
    section = machine[part] if part else machine
    section[data.draw(st.sampled_from([*section, "other"]))] = value
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(machine))
    words = ["plan", *SMALL, "--seq-len", "16", "--micro-batch", "1", "--activations", "keep"]
    assert quietly([*words, "--machine", str(path)]) in (0, 2, 3)


FLAGS = st.sampled_from(
    [
        *("--gpus", "--tensor", "--pipeline", "--chunks", "--context", "--zero-stage"),
        *("--accumulation", "--lora-rank", "--device-memory", "--ssd-write-bytes-per-day"),
        *("--framework", "--emit", "--sequence-parallel", "--json", "--attention"),
        *("--placement", "--dtype", "--help"),
    ]
)
VALUES = st.sampled_from(
    [
        *("0", "1", "2", "4", "-1", "99999999999", "x", "4GiB", "1kB", "ssd", "host", "plain"),
        *("torch", "deepspeed", "megatron", "float16", "/nowhere/x", "--", "=", "seq-len=1:2", ""),
    ]
)


@FUZZ
@given(st.lists(FLAGS | VALUES | st.tuples(FLAGS, VALUES), max_size=6))
def test_no_arguments_make_a_traceback(given_words: list[Any]) -> None:
    flat = [word for each in given_words for word in ([each] if isinstance(each, str) else each)]
    words = ["plan", "--model", "gpt2", "--machine", "h100-sxm", "--seq-len", "64"]
    words += ["--micro-batch", "1", "--activations", "keep", *flat]
    assert quietly(words) in (0, 2, 3)


@FUZZ
@given(text=st.text(max_size=30) | JSON.map(json.dumps))
def test_no_file_makes_a_traceback(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(text, encoding="utf-8", errors="replace")
    batch = ["--seq-len", "16", "--micro-batch", "1"]
    assert quietly(["plan", "--model", str(path), "--machine", "laptop", *batch]) == 2
    assert quietly(["plan", "--model", "gpt2", "--machine", str(path), *batch]) == 2
    assert quietly(["predict", str(path), "--machine", "laptop"]) == 2


def test_what_is_nested_too_deep_or_no_text_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    assert "deep" in said(capsys, "plan", "--model", str(path), "--machine", "laptop", status=2)
    path.write_bytes(b"\xff\xfe")
    assert "no text" in said(capsys, "plan", "--model", str(path), "--machine", "laptop", status=2)


# ---- a process of its own --------------------------------------------------------------------


def test_it_needs_no_torch() -> None:
    blocked = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'numpy', 'offload']))\n"
        "from perfmodel.cli import main\n"
        f"sys.exit(main({PLAN!r}) or main(['validate']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_it_runs_as_a_module_and_a_reader_may_leave() -> None:
    command = [sys.executable, "-m", "perfmodel", "models"]
    read, write = os.pipe()
    os.close(read)
    try:
        left = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=100)
    finally:
        os.close(write)
    assert (left.returncode, left.stderr) == (1, b"")
