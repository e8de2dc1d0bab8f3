"""Workloads out of arguments: published models, files, Megatron's arguments, a few numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perfmodel.commands.arguments import Parser
from perfmodel.commands.asked import Asked, asked
from perfmodel.commands.plan import add_arguments

LLAMA = ["--model", "llama-3-8b", "--machine", "h100-sxm"]
BATCH = ["--seq-len", "512", "--micro-batch", "2"]
MEGATRON = """
torchrun pretrain_gpt.py \\
    --num-layers 4 --hidden-size 256 --num-attention-heads 4 \\
    --seq-length 128 --max-position-embeddings 128 --vocab-size 1000 \\
    --micro-batch-size 2 --global-batch-size 32 --bf16 --lr 1e-4  # slowly
"""


def ask(*words: str) -> Asked:
    parser = Parser(prog="perfmodel plan")
    add_arguments(parser)
    return asked(parser.read(words))


def test_ranks_that_are_not_named_share_data() -> None:
    parallel = ask(
        *LLAMA, *BATCH, "--gpus", "32", "--tensor", "4", "--pipeline", "2"
    ).workload.parallel
    assert (parallel.data, parallel.tensor, parallel.pipeline, parallel.ranks) == (4, 4, 2, 32)
    assert ask(*LLAMA, *BATCH, "--tensor", "4").workload.parallel.ranks == 4


def test_a_global_batch_is_split_over_ranks_and_forwards() -> None:
    workload = ask(*LLAMA, *BATCH, "--gpus", "8", "--global-batch", "64").workload
    assert (workload.micro_batch, workload.accumulation, workload.parallel.data) == (2, 4, 8)


def test_only_ranks_in_use_share_the_machine() -> None:
    assert ask(*LLAMA, *BATCH).used_machine.devices == 1
    assert ask(*LLAMA, *BATCH, "--gpus", "64").used_machine.devices == 8
    assert ask(*LLAMA, *BATCH).machine.devices == 8


def test_a_few_numbers_are_a_model_of_the_example() -> None:
    numbers = ["--layers", "2", "--hidden", "64", "--heads", "4"]
    workload = ask(*numbers, *BATCH, "--machine", "laptop").workload
    assert (workload.plain, workload.model.num_layers, workload.model.vocab_size) == ("gpt", 2, 256)
    workload = ask("--model", "t5", *numbers, *BATCH, "--machine", "laptop").workload
    assert (workload.plain, workload.model.encoder_layers) == ("t5", 2)
    with pytest.raises(ValueError, match="share data alone"):
        ask(*numbers, *BATCH, "--machine", "laptop", "--tensor", "2")


def test_a_config_is_taken_from_its_file_or_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(config))
    for name in (folder, folder / "config.json"):
        model = ask("--model", str(name), *BATCH, "--machine", "laptop").workload.model
        assert (model.name, model.hidden_size) == ("mine", 64)


def test_a_command_line_of_megatron_is_a_whole_workload(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(MEGATRON)
    words = ["--model", str(script), "--machine", "h100-sxm"]
    found = ask(*words)
    workload = found.workload
    assert (workload.seq_len, workload.micro_batch, workload.accumulation) == (128, 2, 16)
    assert (workload.framework, workload.dtype) == ("megatron", "bfloat16")
    assert any("lr" in note for note in found.notes)


def test_flags_beside_a_command_line_of_megatron_count_more(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(MEGATRON)
    words = ["--model", str(script), "--machine", "h100-sxm", "--gpus", "4", "--tensor", "2"]
    workload = ask(*words, "--seq-len", "64", "--micro-batch", "4", "--zero-stage", "1").workload
    assert (workload.seq_len, workload.micro_batch, workload.accumulation) == (64, 4, 4)
    assert (workload.parallel.tensor, workload.parallel.data) == (2, 2)
    assert workload.parallel.zero_stage == 1


def test_megatrons_arguments_as_json_are_the_same(tmp_path: Path) -> None:
    script, mapping = tmp_path / "train.sh", tmp_path / "arguments.json"
    script.write_text(MEGATRON)
    mapping.write_text(
        json.dumps(
            {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 128}
            | {"max_position_embeddings": 128, "vocab_size": 1000, "micro_batch_size": 2}
            | {"global_batch_size": 32, "bf16": True}
        )
    )
    of = [ask("--model", str(each), "--machine", "laptop").workload for each in (script, mapping)]
    assert of[0] == of[1]


def test_more_positions_than_a_model_has_are_noted() -> None:
    short, long = (
        ask("--model", "gpt2", "--machine", "laptop", "--micro-batch", "1", "--seq-len", length)
        for length in ("1024", "2048")
    )
    assert not short.notes
    assert any("1,024 learned positions" in note for note in long.notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "6", "--tensor", "4"], "--gpus 6 is not a multiple of the 4 ranks"),
        (["--gpus", "0"], "--gpus 0"),
        (["--tensor", "0"], "--tensor 0"),
        (["--tensor", "3"], "tensor=3 does not divide num_heads=32"),
        (["--zero-stage", "4"], "zero_stage=4"),
        (["--accumulation", "2", "--global-batch", "4"], "say the same"),
        (["--global-batch", "5"], "global_batch=5 is not a multiple"),
        (["--accumulation", "9999999"], "sequences of a rank"),
        (["--layers", "4"], "--layers is for --model gpt"),
        (["--device-memory", "1GiB"], "below the 15.0 GiB of a rank's parameters"),
        (["--gpus", "-1"], "argument --gpus"),
        (["--sequence-paralel"], "did you mean '--sequence-parallel'"),
        (["extra"], "'extra' is no argument"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_key(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ask(*LLAMA, *BATCH, *words)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [("n_layer", 2001, "layers"), ("n_layer", 10**12, "layers"), ("n_embd", 1 << 36, "parameters")],
)
def test_a_model_too_large_to_be_taken_down_is_refused(
    tmp_path: Path, key: str, value: int, what: str
) -> None:
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=f"{what} are more than"):
        ask("--model", str(tmp_path), *BATCH, "--machine", "laptop")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "neither a config.json nor"),
        ("--num-layers 'two", "is no command line"),
        ("--num-layers 4", "--hidden-size is missing"),
        ("{", "is no JSON"),
        ("[]", "is an object, not list"),
        ('{"model_type": ["gpt2"]}', "model_type=..gpt2.. is not known"),
        ('{"model_type": "lama"}', "did you mean 'llama'"),
    ],
)
def test_a_file_that_is_no_model_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "some"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        ask("--model", str(path), *BATCH, "--machine", "laptop")
