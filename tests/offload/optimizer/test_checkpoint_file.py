"""`AdamW.save` and `load`: any placement, any order of memory, and never a broken checkpoint."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.offload.optimizer.test_adamw import PLACEMENTS, require_equal, run, states_of

Make = Callable[..., Any]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints go, apart from what is spilled."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def saved(folder: Path, adamw: Make, parameters: Make, give_grads: Make) -> Path:
    """A checkpoint of two steps."""
    params = parameters()
    optimizer = adamw(params)
    run(optimizer, params, give_grads, range(2))
    optimizer.save(folder / "states")
    return folder / "states"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", PLACEMENTS)
@pytest.mark.parametrize("second", PLACEMENTS)
def test_a_file_goes_on_at_another_placement_to_the_same_bits(
    adamw: Make,
    parameters: Make,
    give_grads: Make,
    folder: Path,
    dtype: torch.dtype,
    first: str,
    second: str,
) -> None:
    params, others = parameters(dtype), parameters(dtype)
    optimizer, whole = adamw(params, placement=first), adamw(others)
    run(optimizer, params, give_grads, range(3))
    optimizer.save(folder / "states")
    resumed = adamw(params, 7.0, placement=second, subgroup_params=77, staging_bytes=1 << 22)
    resumed.load(folder / "states")
    assert resumed.param_groups[0]["lr"] == 1e-3
    assert resumed.param_groups[0]["betas"] == (0.9, 0.999)
    run(resumed, params, give_grads, range(3, 6))
    run(whole, others, give_grads, range(6))
    assert all(map(torch.equal, params, others))
    require_equal(states_of(resumed), states_of(whole))
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["states"]


@pytest.mark.parametrize("size", [77, 1000, 1 << 20])
def test_any_reader_of_safetensors_finds_torchs_states_in_it(
    adamw: Make, give_grads: Make, folder: Path, size: int
) -> None:
    image = torch.randn(4, 5, 6, 7).to(memory_format=torch.channels_last)
    tensors = [torch.randn(300), image, torch.randn(9, 40).t(), torch.zeros(0, 3)]
    params = [torch.nn.Parameter(tensor) for tensor in tensors]
    optimizer = adamw(params, subgroup_params=size, staging_bytes=1 << 22, placement="ssd")
    run(optimizer, params, give_grads, range(2))
    optimizer.save(folder / "states")
    states = states_of(optimizer)
    with safe_open(folder / "states", framework="pt") as file:
        assert len(file.keys()) == 2 * len(params)
        for number, state in states.items():
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(file.get_tensor(f"{number}.{name}"), state[name])
        assert json.loads(file.metadata()["steps"]) == {str(number): 2 for number in states}
    resumed = adamw(params)
    resumed.load(folder / "states")
    require_equal(states_of(resumed), states)


def test_groups_and_what_has_not_been_updated_come_back_as_they_were(
    adamw: Make, parameters: Make, give_grads: Make, folder: Path
) -> None:
    params = parameters()
    groups = [
        {"params": params[:4], "lr": torch.tensor(0.25), "name": "first"},
        {"params": params[4:], "weight_decay": 0.0},
    ]
    optimizer = adamw(groups)
    give_grads(params, 0)
    params[2].grad = None
    optimizer.step()
    optimizer.save(folder / "states")
    resumed = adamw([{"params": params[:4]}, {"params": params[4:]}])
    resumed.load(folder / "states")
    assert 2 not in states_of(resumed)
    require_equal(states_of(resumed), states_of(optimizer))
    assert [group["lr"] for group in resumed.param_groups] == [0.25, 1e-3]
    assert [group["weight_decay"] for group in resumed.param_groups] == [1e-2, 0.0]
    assert resumed.param_groups[0]["name"] == "first"


def test_what_json_has_no_word_for_is_refused_and_the_last_checkpoint_stays(
    saved: Path, adamw: Make, parameters: Make
) -> None:
    before = saved.read_bytes()
    optimizer = adamw([{"params": parameters(), "extra": {1, 2}}])
    with pytest.raises(ValueError, match=r"\{1, 2\} of a parameter group"):
        optimizer.save(saved)
    assert saved.read_bytes() == before


def spoil_byte(data: bytearray) -> bytes:
    data[-5] ^= 1
    return bytes(data)


def other_format(data: bytearray) -> bytes:
    return bytes(data.replace(b"offload.AdamW 1", b"offload.AdamW 9"))


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (spoil_byte, OSError, r"8\.exp_avg_sq has the CRC32C .* was saved"),
        (lambda data: bytes(data[:-1]), ValueError, "is no checkpoint .* bytes, not"),
        (lambda data: bytes(data[:7]), ValueError, "has no header"),
        (lambda data: b"", ValueError, "has no header"),
        (lambda data: b"\xff" * 200, ValueError, "has no header"),
        (
            lambda data: bytes(data[:8]) + b"[" + bytes(data[9:]),
            ValueError,
            "header that is damaged",
        ),
        (other_format, ValueError, "'offload.AdamW 9', not 'offload.AdamW 1'"),
    ],
)
def test_a_spoiled_file_is_refused_before_anything_changes(
    saved: Path,
    adamw: Make,
    parameters: Make,
    give_grads: Make,
    spoil: Callable[[bytearray], bytes],
    error: type[Exception],
    said: str,
) -> None:
    saved.write_bytes(spoil(bytearray(saved.read_bytes())))
    params = parameters()
    optimizer = adamw(params, 0.5)
    run(optimizer, params, give_grads, range(1))
    before = states_of(optimizer)
    with pytest.raises(error, match=said) as raised:
        optimizer.load(saved)
    assert str(saved) in str(raised.value)
    require_equal(states_of(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_file_of_other_parameters_or_none_is_refused(
    saved: Path, adamw: Make, parameters: Make
) -> None:
    with pytest.raises(ValueError, match=r"states: .* 9 parameters, but there are 8"):
        adamw(parameters()[:-1]).load(saved)
    with pytest.raises(ValueError, match="shape"):
        adamw(parameters()[::-1]).load(saved)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        adamw(parameters()).load(saved.with_name("nowhere"))
    missing = saved.parent / "nowhere" / "states"
    with pytest.raises(FileNotFoundError, match="name a file in a folder that exists") as raised:
        adamw(parameters()).save(missing)
    assert raised.value.filename == str(missing)
    for method in ("save", "load"):
        with pytest.raises(IsADirectoryError, match="name a file in it") as raised:
            getattr(adamw(parameters()), method)(saved.parent)
        assert raised.value.filename == str(saved.parent)


def test_too_little_space_is_said_before_a_byte_is_written(
    saved: Path, adamw: Make, parameters: Make, give_grads: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters()
    optimizer = adamw(params)
    run(optimizer, params, give_grads, range(1))
    real, before = os.statvfs(saved.parent), saved.read_bytes()
    few = os.statvfs_result([*real[:4], 3, *real[5:]])
    monkeypatch.setattr(os, "statvfs", lambda _path: few)
    with pytest.raises(OSError, match=r"needs \d+ bytes, but \d+ are free") as raised:
        optimizer.save(saved)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent).count("states.part") == 0


def test_a_write_that_fails_midway_leaves_the_last_checkpoint(
    saved: Path, adamw: Make, parameters: Make, give_grads: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters()
    optimizer = adamw(params)
    run(optimizer, params, give_grads, range(1))
    before, real, calls = saved.read_bytes(), os.pwrite, iter(range(5))

    def failing(file: int, data: Any, offset: int) -> int:
        if next(calls, None) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, data[: max(1, len(data) // 2)], offset)  # short ones are gone on with

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OSError, match="Input/output error") as raised:
        optimizer.save(saved)
    assert raised.value.filename == str(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent).count("states.part") == 0
    monkeypatch.undo()
    optimizer.save(saved)
    resumed = adamw(parameters())
    resumed.load(saved)
    require_equal(states_of(resumed), states_of(optimizer))


@pytest.mark.parametrize("call", ["pread", "preadv"])
def test_a_read_that_fails_names_the_file_and_changes_nothing(
    saved: Path, adamw: Make, parameters: Make, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    optimizer = adamw(parameters())

    def failing(*_arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match="Input/output error") as raised:
        optimizer.load(saved)
    assert raised.value.filename == str(saved)
    assert not optimizer.state_dict()["state"]


def test_two_do_not_save_to_one_place_at_once(saved: Path, adamw: Make, parameters: Make) -> None:
    part = saved.with_name("states.part")
    with part.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process is saving there") as raised:
            adamw(parameters()).save(saved)
        assert raised.value.errno == errno.EBUSY
        assert part.exists()
    adamw(parameters()).save(saved)  # what a dead process has left is written over
    assert not part.exists()


@pytest.mark.usefixtures("one_thread")  # of which a forked child has more than the name
def test_a_process_killed_while_saving_leaves_a_whole_checkpoint_fifty_times(
    adamw: Make, folder: Path
) -> None:
    path, chance = folder / "states", random.Random(0)
    params = [torch.nn.Parameter(torch.zeros(1 << 17)) for _ in range(8)]  # 8 MiB of states
    optimizer = adamw(params, subgroup_params=1 << 16)

    def fill(version: int) -> None:
        for _, states in optimizer._subgroups:
            states.begin().fill_(version)
        optimizer._steps = dict.fromkeys(params, version)

    def save_again_and_again(version: int) -> None:
        while True:
            version += 1
            fill(version)
            optimizer.save(path)

    fill(1)
    optimizer.save(path)
    resumed = adamw(params, subgroup_params=1 << 16)
    version, torn = 1, 0
    for _ in range(50):
        child = os.fork()
        if not child:
            try:
                save_again_and_again(version)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.002, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        torn += path.with_name("states.part").exists()
        resumed.load(path)
        versions = {value for _, states in resumed._subgroups for value in states.read().unique()}
        assert len({float(value) for value in versions}) == 1
        assert set(resumed._steps.values()) == {int(versions.pop())}
        assert resumed._steps[params[0]] >= version
        version = resumed._steps[params[0]]
    assert version > 1, "no child ever saved"
    assert torn > 10, "no child was killed while it saved"
