"""Steps that are broken off, drives that fail, checkpoints that are damaged: all can go on."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.device.emulated_updates import EmulatedUpdates
from offload.native import FaultPlan, FaultRule
from offload.optimizer import host_side
from offload.optimizer.interruption import Uninterrupted
from tests.offload.optimizer.test_adamw import require_equal, run, states_of

Make = Callable[..., Any]


@pytest.fixture
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for checkpoints, beside the one for states."""
    return tmp_path_factory.mktemp("saved")


def test_signals_are_held_back_until_they_may_raise() -> None:
    said: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: said.append("handled"))
    try:
        with Uninterrupted() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            said.append("noted")
            signals.deliver()
            said.append("delivered")
            os.kill(os.getpid(), signal.SIGUSR1)
            said.append("last")
        assert said == ["noted", "handled", "delivered", "last", "handled"]

        def interrupted() -> None:
            with Uninterrupted():
                os.kill(os.getpid(), signal.SIGINT)
                said.append("after Ctrl-C")

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert said[-1] == "after Ctrl-C"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("beside", [None, "host", "device"])
def test_a_step_that_ctrl_c_breaks_off_is_finished_by_another_call(
    adamw: Make,
    parameters: Make,
    give_grads: Make,
    device: EmulatedUpdates,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    beside: str | None,
) -> None:
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    more = {} if beside is None else {"emulated_device": device, "update_schedule": beside}
    optimizer, whole = adamw(params, **more), adamw(others)
    run(whole, others, give_grads, range(3))
    run(optimizer, params, give_grads, range(2))
    module: Any = host_side if beside is None else device
    name = {None: "adam_update", "host": "update_on_host", "device": "update"}[beside]
    update, calls = getattr(module, name), [0]

    def interrupted(*args: Any, **settings: Any) -> Any:
        result = update(*args, **settings)
        if calls[0] == at:  # as late as a handler could run after the update
            os.kill(os.getpid(), signal.SIGINT)
        calls[0] += 1
        return result

    monkeypatch.setattr(module, name, interrupted)
    give_grads(params, 2)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    # All that a device does is queued at once: there it came at the end of a whole step.
    assert (optimizer._unfinished is None) is (beside == "device")
    if optimizer._unfinished is not None:
        optimizer.step()
    if beside is not None:
        optimizer.device_side.settle()
    assert all(map(torch.equal, params, others))
    require_equal(states_of(optimizer), states_of(whole))


@pytest.mark.parametrize("placement", ["host", "device=0.5,host=0.5", "ssd", "host=0.5,ssd=0.5"])
@pytest.mark.parametrize("schedule", ["host", "device", "share=0.5"])
def test_parameters_of_several_types_beside_a_device_change_no_bit(
    adamw: Make, device: EmulatedUpdates, placement: str, schedule: str
) -> None:
    def made() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        found = []
        for number in range(12):
            size = 33 if number % 2 else 1777
            dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
            found.append(torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)))
        return found

    def trained(optimizer: Any, params: list[torch.nn.Parameter]) -> None:
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            optimizer.step()

    params, others = made(), made()
    trained(adamw(others), others)
    optimizer = adamw(
        params,
        emulated_device=device,
        update_schedule=schedule,
        placement=placement,
        staging_bytes=1 << 17,
    )
    trained(optimizer, params)
    optimizer.device_side.settle()
    assert all(map(torch.equal, params, others))


def test_parameters_are_added_to_states_on_the_ssd_beside_a_device(
    adamw: Make, parameters: Make, give_grads: Make, device: EmulatedUpdates
) -> None:
    params, others = parameters(), parameters()
    optimizer = adamw(params[:4], placement="ssd", emulated_device=device)
    whole = adamw(others[:4])
    for each, own in ((optimizer, params), (whole, others)):
        run(each, own, give_grads, range(2))
        each.add_param_group({"params": own[4:]})
        run(each, own, give_grads, range(2, 4))
    assert all(map(torch.equal, params, others))


def test_one_write_that_fails_ends_nothing(
    adamw: Make, parameters: Make, give_grads: Make, saved: Path
) -> None:
    for first in range(12, 40, 3):
        params, others = parameters(), parameters()
        rule = FaultRule(op="write", first=first, count=1, action="error")
        optimizer = adamw(params, placement="ssd", io_engine=FaultPlan(rules=[rule]))
        whole = adamw(others)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step in range(4):
                give_grads(params, step)
                give_grads(others, step)
                whole.step()
                try:
                    optimizer.step()
                except OSError:
                    optimizer.step()
            optimizer.save(saved / "states")
            require_equal(states_of(optimizer), states_of(whole))
        assert sum("their write failed" in str(each.message) for each in said) == 1
        assert all(map(torch.equal, params, others))
        optimizer.load(saved / "states")
        optimizer.close()


def test_a_byte_that_changed_on_the_drive_is_recovered_from_by_a_checkpoint(
    adamw: Make, parameters: Make, give_grads: Make, saved: Path
) -> None:
    params, others = parameters(), parameters()
    rule = FaultRule(op="read", first=60, count=1, action="corrupt", nbytes=100)
    optimizer = adamw(params, placement="ssd", io_engine=FaultPlan(rules=[rule]))
    whole = adamw(others)
    run(whole, others, give_grads, range(2))
    run(optimizer, params, give_grads, range(2))
    kept = [param.detach().clone() for param in params]
    optimizer.save(saved / "states")
    with pytest.raises(OSError, match="returned other bytes"):
        run(optimizer, params, give_grads, range(2, 12))
    with torch.no_grad():
        for param, before in zip(params, kept, strict=True):
            param.copy_(before)
    optimizer.load(saved / "states")
    require_equal(states_of(optimizer), states_of(whole))
    run(optimizer, params, give_grads, range(2, 4))
    run(whole, others, give_grads, range(2, 4))
    assert all(map(torch.equal, params, others))


def test_a_checkpoint_that_is_refused_leaves_a_half_done_step_as_it_is(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params, others = parameters(), parameters()
    rule = FaultRule(op="read", first=14, count=1, action="error")
    optimizer = adamw(params, placement="ssd", io_engine=FaultPlan(rules=[rule]))
    whole = adamw(others)
    run(whole, others, give_grads, range(3))
    with pytest.raises(OSError, match="subgroups are updated"):
        run(optimizer, params, give_grads, range(3))
    wrong = whole.state_dict()
    wrong["state"][0]["exp_avg"] = torch.zeros(1)
    for refused in ({"oops": 1}, wrong):
        with pytest.raises(ValueError, match="the checkpoint"):
            optimizer.load_state_dict(refused)
        with pytest.raises(RuntimeError, match="half done"):
            optimizer.state_dict()


@pytest.mark.parametrize("step", [-3, 1.5, float("nan"), "one", None])
def test_a_checkpoint_with_an_impossible_step_is_refused(
    adamw: Make, parameters: Make, give_grads: Make, step: Any
) -> None:
    params = parameters()
    optimizer = adamw(params)
    run(optimizer, params, give_grads, range(1))
    before, wrong = states_of(optimizer), optimizer.state_dict()
    wrong["state"][2]["step"] = torch.tensor(step) if isinstance(step, float) else step
    with pytest.raises(ValueError, match="step 2 of the checkpoint"):
        optimizer.load_state_dict(wrong)
    wrong["state"][2]["step"], wrong["state"][1]["exp_avg"] = 1, [0.0]
    with pytest.raises(ValueError, match="exp_avg 1 of the checkpoint is a list"):
        optimizer.load_state_dict(wrong)
    require_equal(states_of(optimizer), before)


def test_each_changed_byte_of_a_checkpoints_header_is_an_error(
    adamw: Make, parameters: Make, give_grads: Make, saved: Path
) -> None:
    params = parameters(torch.bfloat16)
    optimizer = adamw(params)
    run(optimizer, params, give_grads, range(2))
    path = saved / "states"
    optimizer.save(path)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    before = states_of(optimizer)
    for at in range(0, header, 7):
        for bit in (1, 16, 32):
            path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
            with pytest.raises((OSError, ValueError), match=str(path)):
                optimizer.load(path)
    require_equal(states_of(optimizer), before)


def test_a_checkpoint_of_torch_shows_master_copies_at_once(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params = parameters(torch.bfloat16)
    torchs = torch.optim.AdamW(params)
    run(torchs, params, give_grads, range(2))
    optimizer = adamw(params)
    with pytest.warns(UserWarning, match="no master_param"):
        optimizer.load_state_dict(torchs.state_dict())
    for param, states in zip(params, optimizer.state_dict()["state"].values(), strict=True):
        assert torch.equal(states["master_param"], param.detach().float())


def test_a_parameter_with_new_memory_is_taken_over_into_its_master_copy(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params = parameters(torch.bfloat16)
    optimizer = adamw(params)
    run(optimizer, params, give_grads, range(2))
    for param in params:
        param.data = torch.zeros_like(param)
    run(optimizer, params, give_grads, range(2, 3))
    assert all(param.abs().max() < 0.1 for param in params)


def test_forked_children_leave_what_is_their_parents(
    adamw: Make, parameters: Make, give_grads: Make
) -> None:
    params = parameters()
    closed, opened = adamw(params, placement="ssd"), adamw(params, placement="ssd")
    run(closed, params, give_grads, range(1))
    run(opened, params, give_grads, range(1))
    closed.close()
    child = os.fork()
    if not child:
        said = 0
        for call in (opened.state_dict, opened.step, lambda: opened.save("never")):
            try:
                call()
            except RuntimeError as error:
                said += "a forked child has to make its own" in str(error)
        # As at the end of an interpreter: what is closed, and what is not, goes.
        del closed._placement, closed._host_side, closed._subgroups, closed._finalizer
        gc.collect()
        os._exit(said)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_a_second_optimizer_is_told_that_it_finds_no_gradients(
    adamw: Make, parameters: Make
) -> None:
    params = parameters()
    first = adamw(params, early_gradients=True)
    with pytest.warns(RuntimeWarning, match=r"close\(\) it first"):
        adamw(params)
    first.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamw(params, early_gradients=True)


@pytest.mark.parametrize("wrong", ["states.safetensors", None, 3])
def test_a_file_is_told_from_a_state_dict(adamw: Make, parameters: Make, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"comes back by load\(path\)"):
        adamw(parameters()).load_state_dict(wrong)


def test_a_copy_that_fails_after_its_update_is_made_by_the_next_call(
    adamw: Make,
    parameters: Make,
    give_grads: Make,
    device: EmulatedUpdates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizer = adamw(params, emulated_device=device, update_schedule="host")
    whole = adamw(others)
    run(whole, others, give_grads, range(3))
    run(optimizer, params, give_grads, range(2))
    copy, left = device.copy, [2]

    def failing(name: str, *args: Any) -> Any:
        left[0] -= name == "parameters"
        if left[0] == 0 and name == "parameters":
            raise OSError(5, "the link has failed")
        return copy(name, *args)

    monkeypatch.setattr(device, "copy", failing)
    give_grads(params, 2)
    with pytest.raises(OSError, match="the link has failed"):
        optimizer.step()
    optimizer.step()
    assert all(map(torch.equal, params, others))
    require_equal(states_of(optimizer), states_of(whole))
