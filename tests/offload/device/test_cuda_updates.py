"""What `CudaUpdates` asks of CUDA, in which order, told by streams that take notes.

The fake kernels compute on the host. Whether CUDA does all this is for a machine with a GPU.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import offload
from offload.device import cuda
from offload.device.cuda_updates import CudaUpdates
from offload.device.updates import Arrays
from offload.native import (
    NORM_BLOCK,
    AdamSettings,
    ThreadPool,
    adam_update,
    plain_sum,
    squared_norm,
)
from offload.optimizer.interleaved import Interleaved, Job
from offload.optimizer.interruption import Uninterrupted
from offload.optimizer.layout import lay_out
from offload.optimizer.states import HostStates

CPU = torch.device("cpu")
SETTINGS = AdamSettings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
QUEUES = ("states in", "states out", "gradients", "parameters", "device")


class Event:
    count = 0

    def __init__(self, log: list[tuple[str, str, str]]) -> None:
        self.log = log
        Event.count += 1
        self.name = f"event {Event.count}"

    def record(self, stream: Stream) -> None:
        self.log.append((stream.name, "records", self.name))

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.log.append(("host", "waits for", self.name))

    def elapsed_time(self, end: Event) -> float:
        return 500.0  # milliseconds


class Stream:
    cuda_stream = 7

    def __init__(self, log: list[tuple[str, str, str]], name: str) -> None:
        self.log, self.name = log, name

    def wait_event(self, event: Event) -> None:
        self.log.append((self.name, "waits for", event.name))

    def synchronize(self) -> None:
        self.log.append(("host", "waits for", self.name))


class HostKernels:
    """Does at once what the kernels would do in time."""

    def __init__(self) -> None:
        self._pool = ThreadPool(1)

    def update(
        self, settings: AdamSettings, step: int, arrays: Arrays, *, clip: float, stream: int
    ) -> None:
        assert stream == Stream.cuda_stream
        adam_update(self._pool, settings, step, clip=clip, **vars(arrays))

    def block_sums(
        self, values: torch.Tensor, sums: torch.Tensor, *, squares: bool, stream: int
    ) -> None:
        total = squared_norm if squares else plain_sum
        for number, block in enumerate(values.split(NORM_BLOCK)):
            sums[number] = total(self._pool, block)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, str]]]:
    """Have streams and events note what is asked of them."""
    notes: list[tuple[str, str, str]] = []
    names = iter(QUEUES * 8)
    compute = Stream(notes, "compute")
    monkeypatch.setattr(cuda, "_Stream", lambda _device: Stream(notes, next(names)))
    monkeypatch.setattr(cuda, "_Event", lambda enable_timing, blocking: Event(notes))
    monkeypatch.setattr(cuda, "_cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: compute)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 0)
    Runtime.pinned.clear()
    yield notes
    assert not Runtime.pinned


class Runtime:
    pinned: ClassVar[set[int]] = set()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.pinned.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.pinned.remove(address)
        return 0


def open_device() -> CudaUpdates:
    kernels: Any = HostKernels()
    return CudaUpdates(CPU, kernels)


def test_a_copy_waits_on_its_own_stream_for_all_that_it_must(log: list[Any]) -> None:
    device = open_device()
    first, second = device.ready(), device.ready()
    log.clear()
    source, target = torch.ones(6), torch.zeros(6)
    moment: Any = device.copy("states out", source, target, (first, second))
    events = [name for _, what, name in log if what == "records"]
    assert log == [
        ("states out", "waits for", first.name),  # type: ignore[attr-defined]
        ("states out", "waits for", second.name),  # type: ignore[attr-defined]
        ("states out", "records", events[0]),
        ("states out", "records", events[1]),
    ]
    assert moment.name == events[1]
    assert torch.equal(target, source)
    log.clear()
    device.hold(moment)
    assert log == [("compute", "waits for", events[1])]
    assert device.done()["states out"] == (24.0, 0.5)


def steps_of(device: CudaUpdates, count: int, log: list[Any]) -> list[list[Any]]:
    """Return what each of `count` updates asks for, in which every subgroup moves."""
    params = [torch.nn.Parameter(torch.ones(40).bfloat16())]
    params[0].grad = torch.ones(40).bfloat16()
    subgroups = lay_out(0, params, 10, all_masters=True)
    rows = [HostStates(subgroup) for subgroup in subgroups]
    engine = Interleaved(device, ThreadPool(1), 10, buffers=2, slots=1)
    notes = [[*log]]
    for step in range(1, count + 1):
        log.clear()
        jobs = [
            Job(
                "moved",
                states,
                subgroup.pieces,
                SETTINGS,
                {params[0]: step},
                lambda piece: piece.of(piece.param.grad),
            )
            for subgroup, states in zip(subgroups, rows, strict=True)
        ]
        progress = SimpleNamespace(done=set(), pieces=set())
        engine.run(dict(enumerate(jobs)), 1.0, progress, Uninterrupted())
        notes.append([*log])
    log.clear()
    engine.close()
    return notes


def test_states_come_in_only_after_they_have_gone_out_and_their_buffer_is_free(
    log: list[Any],
) -> None:
    device = open_device()
    made, first, second = steps_of(device, 2, log)
    of_buffers = [name for stream, what, name in made if (stream, what) == ("compute", "records")]
    waits = [name for stream, what, name in first if (stream, what) == ("states in", "waits for")]
    ends = [name for stream, what, name in first if (stream, what) == ("states out", "records")]
    left = ends[1::2]  # each copy records its begin and its end
    assert len(of_buffers) == 2
    assert len(left) == 4
    # Two buffers: the first two wait for their memory, the others for what was in them.
    assert waits == [*of_buffers, *left[:2]]
    waits = [name for stream, what, name in second if (stream, what) == ("states in", "waits for")]
    begun = [name for stream, what, name in second if (stream, what) == ("states out", "records")]
    # Buffers in turn: the last two of the step before; and each for its own states.
    assert waits == [left[2], left[0], left[3], left[1], begun[1], left[2], begun[3], left[3]]
    held = [name for stream, what, name in second if (stream, what) == ("compute", "waits for")]
    assert set(begun[1::2]) <= set(held)


def test_the_host_waits_before_it_looks_at_states_that_moved(log: list[Any]) -> None:
    device = open_device()
    steps_of(device, 1, log)
    assert len([note for note in log if note[0] == "host"]) == 4  # by closing


@pytest.mark.parametrize("schedule", ["host", "device", "share=0.5"])
@pytest.mark.parametrize("placement", ["host", "device", "device=0.3,host=0.7"])
def test_beside_cuda_the_bits_are_the_hosts(
    log: list[Any], schedule: str, placement: str, spill_dir: Any
) -> None:
    def trained(**settings: Any) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16())
            for shape in ((33, 7), (1000,), (5,), (64, 64))
        ]
        optimizer = offload.AdamW(params, subgroup_params=300, max_norm=1.0, threads=1, **settings)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).bfloat16()
            optimizer.step()
        states = optimizer.state_dict()["state"]
        optimizer.close()
        return [*params, *(states[number]["master_param"] for number in range(len(params)))]

    device = open_device()
    found = trained(emulated_device=device, update_schedule=schedule, placement=placement)
    device.close()
    assert all(map(torch.equal, found, trained()))


def test_a_step_whose_kernel_was_refused_is_finished_by_another_call(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = open_device()
    params = [torch.nn.Parameter(torch.ones(1000).bfloat16())]
    settings: dict[str, Any] = {"subgroup_params": 300, "threads": 1, "lr": 0.1}
    optimizer = offload.AdamW(params, emulated_device=device, update_schedule="device", **settings)
    params[0].grad = torch.ones(1000).bfloat16()

    def refused(*_arguments: Any, **_settings: Any) -> None:
        raise RuntimeError("CUDA does not take an update")

    with monkeypatch.context() as patch:
        patch.setattr(HostKernels, "update", refused)
        for _ in range(5):  # more often than there are buffers
            with pytest.raises(RuntimeError, match="CUDA does not take"):
                optimizer.step()
    optimizer.step()
    plain = [torch.nn.Parameter(torch.ones(1000).bfloat16())]
    plain[0].grad = torch.ones(1000).bfloat16()
    offload.AdamW(plain, **settings).step()
    assert torch.equal(params[0], plain[0])
    log.clear()
    optimizer.state_dict()
    assert len([note for note in log if note[0] == "host"]) == 4, "of each subgroup that moved"
    optimizer.close()
    device.close()


def test_norms_are_the_hosts_for_every_size(log: list[Any]) -> None:
    device, pool = open_device(), ThreadPool(1)
    rng = random.Random(0)
    sizes = [
        1,
        NORM_BLOCK - 1,
        NORM_BLOCK,
        NORM_BLOCK + 1,
        *(rng.randint(1, 20_000) for _ in "123"),
    ]
    values = [torch.randn(size) for size in sizes]
    assert device.squared_norms(pool, values) == [squared_norm(pool, each) for each in values]
    assert device.plain_sums(pool, values) == [plain_sum(pool, each) for each in values]
    assert device.squared_norms(pool, []) == []
