"""An instance is opened with checked settings, closed for good, and not taken along by fork."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import _global_forward_pre_hooks

import offload
from offload import native

SIZE = 64


class InterruptionError(Exception):
    """What a signal's handler raises."""


def leaves(count: int) -> list[torch.Tensor]:
    return [torch.randn(SIZE, SIZE, requires_grad=True) for _ in range(count)]


def chain(act: offload.ActivationOffload, weights: list[torch.Tensor]) -> torch.Tensor:
    with act.forward():
        y = torch.ones(SIZE, SIZE)
        for weight in weights:
            y = (y * weight).sin()
        return y.sum()


def test_a_closed_instance_says_so(make: Any) -> None:
    act = make()
    loss = chain(act, leaves(2))
    step = act.forward()
    act.close()
    act.close()
    with pytest.raises(RuntimeError, match="close it after the last backward"):
        loss.backward()
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        act.forward()
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        step.__enter__()
    assert act.stats().spill_bytes == 0


def test_closing_inside_a_forward_is_an_error_and_not_a_crash(make: Any) -> None:
    act = make()
    w = torch.ones(SIZE, SIZE, requires_grad=True)

    def forward_that_closes() -> None:
        with act.forward():
            y = (w * 2).exp()
            act.close()
            y.exp().exp()

    with pytest.raises(RuntimeError, match="closed"):
        forward_that_closes()


def test_an_exception_closes_the_outer_context(make: Any) -> None:
    act = make()
    with pytest.raises(KeyError), act:
        raise KeyError
    with pytest.raises(RuntimeError, match="closed"):
        act.forward()


def test_a_forked_child_is_told_to_make_its_own_and_lets_go_of_its_copy(
    make: Any, in_child: Any
) -> None:
    act = make()
    weights = leaves(3)
    losses = [chain(act, weights)]
    assert act.forwards

    def child() -> tuple[list[str], int]:
        said = []
        for deed in (act.forward, losses[0].backward, act.stats):
            try:
                deed()
            except RuntimeError as error:
                said.append(str(error))
        losses.clear()
        act.close()
        return said, len(act.forwards)

    said, open_forwards = in_child(child)
    assert ["forked child" in text for text in said] == [True, True, True]
    assert open_forwards == 0
    losses[0].backward()
    assert weights[0].grad is not None


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"tier": "sdd"}, ValueError, r"tier='sdd'.*did you mean 'ssd'"),
        ({"tier": "host"}, ValueError, r"tier='host'.*needs a GPU"),
        ({"tier": "device"}, ValueError, r"tier='device'.*tier 'ssd'"),
        ({"path": ()}, ValueError, r"path=\(\)"),
        ({"staging_bytes": -1}, ValueError, r"staging_bytes=-1"),
        ({"io_engine": "urin"}, ValueError, r"io_engine='urin'.*did you mean 'uring'"),
        ({"path": "/nowhere/at/all"}, FileNotFoundError, "/nowhere/at/all"),
        ({"path": "/etc/hostname"}, NotADirectoryError, "/etc/hostname"),
        ({"stagin_bytes": 1}, ValueError, "did you mean 'staging_bytes'"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(
    make: Any, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make(**settings)


def test_an_unwritable_directory_is_refused() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root is kept out of nothing but /proc")
    with pytest.raises(OSError, match="/proc"):
        offload.ActivationOffload(path="/proc/self")


@pytest.fixture
def on_signal() -> Iterator[Any]:
    """Let a signal (SIGUSR1) call a function for the length of a test."""
    before = {}

    def handle(function: Any, number: int = signal.SIGUSR1) -> None:
        before[number] = signal.signal(number, lambda *_: function())

    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


def test_close_in_a_signal_handler_waits_for_the_method_it_interrupted(
    make: Any, on_signal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = make()
    on_signal(act.close)
    write = act.transfers._write
    held = []

    def interrupted(address: int, nbytes: int) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        held.append(act.lock._is_owned())
        return write(address, nbytes)

    monkeypatch.setattr(act.transfers, "_write", interrupted)
    with pytest.raises(RuntimeError, match="closed"):
        chain(act, leaves(2))
    assert held == [True]
    with pytest.raises(RuntimeError, match="closed"):
        act.forward()
    with pytest.raises(RuntimeError, match="closed"):
        write(torch.ones(4).data_ptr(), 16)  # the threads are gone, not just told to go


def test_a_forked_child_is_refused_though_another_thread_held_the_lock(
    make: Any, in_child: Any
) -> None:
    act = make()
    loss = chain(act, leaves(2))
    act.transfers.drain()
    taken, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with act.lock:
            taken.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()

    def backward() -> str:
        try:
            loss.backward()
        except RuntimeError as error:
            return str(error)
        return "it went through"

    assert "forked child" in in_child(backward)
    leave.set()
    thread.join()
    loss.backward()


def test_a_signal_ends_the_wait_for_a_drive_that_hangs(spill_dir: Path, on_signal: Any) -> None:
    def interrupt() -> None:
        raise InterruptionError

    on_signal(interrupt)
    slow = native.FaultRule(op="read", action="delay", delay_s=3.0)
    spill = native.Spill(
        str(spill_dir), native.Arena(1 << 20), fault_plan=native.FaultPlan(rules=[slow])
    )
    source = torch.arange(1000, dtype=torch.int32)
    extent = spill.write(source.data_ptr(), source.nbytes)
    assert extent is not None
    extent.wait_written()
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGUSR1))
    timer.start()
    with pytest.raises(InterruptionError):
        extent.fetch()
    timer.join()
    assert spill.stats()["read_bytes"] == 0  # it did not wait for the bytes
    assert native.tensor_at(extent.fetch(), torch.int32, (1000,), (1,), 0).equal(source)
    del extent
    spill.close()


def test_backwards_over_a_retained_graph_hold_nothing_in_between(make: Any) -> None:
    act = make()
    weights = leaves(4)
    loss = chain(act, weights)
    for _ in range(3):
        act.transfers.drain()
        loss.backward(retain_graph=True)
        act.transfers.drain()
        assert act._stores.counters()["used_bytes"] == 0
    assert act.stats().reloaded_bytes == 3 * act.stats().offloaded_bytes > 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_whose_graph_went_first_keeps_nothing(make: Any, fails: bool) -> None:
    act = make()
    step = act.forward()
    try:
        with step:
            y = torch.ones(SIZE, SIZE, requires_grad=True)
            for _ in range(4):
                y = (y * 2).sin()
            del y
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert (step.regions, len(step._weak), step._newest, step.live) == ([], 0, {}, 0)
    assert act.forwards == set()


def test_no_signal_is_lost_in_a_step_and_the_next_step_works(make: Any, on_signal: Any) -> None:
    def interrupt() -> None:
        raise InterruptionError

    def steps(count: int) -> None:
        for _ in range(count):
            chain(act, weights).backward()

    act = make()
    weights = leaves(30)
    on_signal(interrupt, signal.SIGVTALRM)
    lost: list[Any] = []
    top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
    hooks_before = len(_global_forward_pre_hooks)
    before = sys.unraisablehook
    sys.unraisablehook = lost.append
    try:
        for turn in range(100):
            # By the kernel's clock: a thread that sends it would have to wait for the GIL first,
            # and find the main thread outside of Python code.
            signal.setitimer(signal.ITIMER_VIRTUAL, (20 + turn / 3) * 1e-3)
            with pytest.raises(InterruptionError):
                steps(2000)
            assert top_hooks(True) is None, "hooks stay in force after their forward"
    finally:
        sys.unraisablehook = before
    assert not lost
    torch.nn.Identity()(torch.ones(1))  # a hook of modules that was left goes with its first call
    assert len(_global_forward_pre_hooks) <= hooks_before + 1
    chain(act, weights).backward()
    gc.collect()
    act.settle()
    act.transfers.drain()
    assert act.stats().spill_bytes == 0
    assert act._stores.counters()["used_bytes"] == 0
    assert act.forwards == set()


def test_an_interruption_of_any_call_in_a_step_leaves_nothing(make: Any) -> None:
    # As a signal's handler may where a function of ours begins: at each such place, one by one.
    def interrupting(at: int) -> Any:
        left = [at]

        def trace(frame: Any, event: str, _argument: object) -> None:
            if event == "call" and "offload/activations" in frame.f_code.co_filename:
                left[0] -= 1
                if left[0] < 0:
                    raise InterruptionError(frame.f_code.co_qualname)

        return trace, left

    act = make()
    weights = leaves(3)
    chain(act, weights).backward()
    gc.collect()
    gc.freeze()  # so that each collection below looks at little
    at, ended = 0, False
    try:
        while not ended:
            trace, left = interrupting(at)
            where = ""
            sys.settrace(trace)
            try:
                chain(act, weights).backward()
                ended = left[0] >= 0
            except InterruptionError as error:
                where = str(error)
            finally:
                sys.settrace(None)
            gc.collect()
            act.settle()
            assert act.forwards == set(), f"call {at}, of {where}"
            at += 1
    finally:
        gc.unfreeze()
    assert at > 100
    act.transfers.drain()
    assert act._stores.counters()["used_bytes"] == 0


def test_graphs_dropped_in_several_threads_at_once_leave_nothing(make: Any) -> None:
    act = make(staging_bytes=8 << 20)
    weight = torch.randn(SIZE, SIZE, requires_grad=True)

    def drop() -> None:
        for _ in range(300):
            with act.forward():
                y = (weight * 2).sin() * weight.cos()
            del y

    threads = [threading.Thread(target=drop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    act.settle()
    act.transfers.drain()
    assert act.forwards == set()
    assert act.stats().spill_bytes == 0


def test_forgetting_the_forward_is_told(spill_dir: Path) -> None:
    with (
        pytest.warns(RuntimeWarning, match="nothing was offloaded: no `with act.forward"),
        offload.ActivationOffload(path=spill_dir, staging_bytes=1 << 20) as act,
    ):
        act.forward()  # without `with`


@pytest.mark.parametrize(
    ("settings", "grad", "why"),
    [
        ({}, True, "is smaller than min_tensor_bytes=1048576"),
        ({"min_tensor_bytes": 0}, False, "no forward saved any tensor"),
        ({"min_tensor_bytes": 0}, True, ""),
    ],
)
def test_forwards_that_had_nothing_to_offload_are_told(
    spill_dir: Path, settings: dict[str, int], grad: bool, why: str
) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with offload.ActivationOffload(path=spill_dir, staging_bytes=1 << 20, **settings) as act:
            with act.forward(), torch.set_grad_enabled(grad):
                loss = torch.randn(64, requires_grad=True).exp().sum()
            del loss
    assert len(said) == bool(why)
    assert all(why in str(warning.message) for warning in said)


def test_a_directory_in_ram_is_told() -> None:
    if not os.path.isdir("/dev/shm") or native.inspect_directory("/dev/shm").backing != "memory":
        pytest.skip("/dev/shm is not in RAM here")
    with pytest.warns(RuntimeWarning, match="/dev/shm is in RAM"):
        act = offload.ActivationOffload(path="/dev/shm", staging_bytes=1 << 20)
    act.close()


def test_what_cannot_be_hinted_at_is_refused(make: Any) -> None:
    with pytest.raises(TypeError, match="next_backward='x' is not what"):
        make().hint(next_backward="x")


def test_too_much_staging_is_refused_by_name(make: Any) -> None:
    with pytest.raises(MemoryError, match="staging_bytes=1125899906842624"):
        make(staging_bytes=1 << 50)
