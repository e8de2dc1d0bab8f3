"""The I/O core as Python sees it, while the drive is well; test_native_faults.py is the rest."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload import native

BLOCK = 8192
InChild = Callable[[Callable[[], Any]], Any]
ODD_LENGTHS = [1, 511, 512, 4095, 4096, 4097, 5 * BLOCK - 1, 5 * BLOCK, 5 * BLOCK + 1]


def source(nbytes: int, lead: int = 0) -> np.ndarray:
    """Random bytes whose address is `lead` modulo 64."""
    room = np.empty(nbytes + 128, np.uint8)
    begin = -room.ctypes.data % 64 + lead
    data = room[begin : begin + nbytes]
    data[:] = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    return data


def open_spill(
    directory: Path, engine: str, arena: native.Arena | None = None, **settings: object
) -> native.Spill:
    arena = native.Arena(64 * BLOCK) if arena is None else arena
    options = {"queue_depth": 4, "block_bytes": BLOCK, "spill_bytes": 16 << 20} | settings
    return native.Spill(str(directory), arena, engine=engine, **options)


def write(spill: native.Spill, data: np.ndarray) -> native.Extent:
    extent = spill.write(data.ctypes.data, data.nbytes)
    assert extent is not None
    return extent


def assert_holds(buffer: native.Buffer, data: np.ndarray) -> None:
    assert buffer.nbytes == data.nbytes
    assert buffer.address % 64 == data.ctypes.data % 64
    assert bytes(memoryview(buffer)) == data.tobytes()


@pytest.mark.parametrize("lead", [0, 1, 8, 63])
@pytest.mark.parametrize("verify", [True, False])
def test_odd_lengths_come_back_at_the_same_residue_modulo_64(
    spill_dir: Path, engine: str, verify: bool, lead: int
) -> None:
    spill = open_spill(spill_dir, engine, verify=verify)
    for nbytes in ODD_LENGTHS:
        data = source(nbytes, lead)
        extent = write(spill, data)
        assert extent.nbytes == nbytes
        assert extent.offset % 4096 == 0
        assert_holds(extent.fetch(), data)
        extent.wait_written()
        assert_holds(extent.fetch(), data)
        assert extent.prefetch()
        assert_holds(extent.fetch(), data)


def test_zero_bytes_are_refused(spill_dir: Path, engine: str) -> None:
    spill = open_spill(spill_dir, engine)
    with pytest.raises(ValueError, match="0 bytes"):
        spill.write(source(1).ctypes.data, 0)
    assert spill.stats()["used_bytes"] == 0


@settings(
    derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tensors=st.lists(
        st.tuples(st.integers(1, 12 * BLOCK), st.integers(0, 63)), min_size=1, max_size=8
    ),
    arena_pages=st.integers(1, 40),
    block_pages=st.integers(1, 4),
    spill_pages=st.integers(1, 120),
    order=st.randoms(use_true_random=False),
    verify=st.booleans(),
    direct=st.booleans(),
)
def test_whatever_fits_comes_back_and_what_does_not_is_refused(
    spill_dir: Path,
    engine: str,
    tensors: list[tuple[int, int]],
    arena_pages: int,
    block_pages: int,
    spill_pages: int,
    order: random.Random,
    verify: bool,
    direct: bool,
) -> None:
    arena = native.Arena(arena_pages * 4096)
    spill = open_spill(
        spill_dir,
        engine,
        arena,
        block_bytes=block_pages * 4096,
        spill_bytes=spill_pages * 4096,
        verify=verify,
        direct=direct,
    )
    live = []
    taken = 0
    for nbytes, lead in tensors:
        data = source(nbytes, lead)
        pages = -(-(lead + nbytes) // 4096)
        extent = spill.write(data.ctypes.data, nbytes)
        assert (extent is not None) == (taken + pages <= spill_pages)
        if extent is not None:
            taken += pages
            live.append((extent, data))
    assert spill.stats()["used_bytes"] == taken * 4096
    order.shuffle(live)
    for extent, _ in live[::2]:
        extent.prefetch()
    for extent, data in live:
        assert_holds(extent.fetch(), data)
    live.clear()
    del extent
    spill.drain()
    assert spill.stats()["used_bytes"] == 0
    assert arena.stats()["used_bytes"] == 0
    assert arena.stats()["outside_bytes"] == 0


def test_full_spill_space_returns_none_until_an_extent_is_dropped(
    spill_dir: Path, engine: str
) -> None:
    spill = open_spill(spill_dir, engine, spill_bytes=3 * BLOCK)
    data = source(2 * BLOCK)
    first = write(spill, data)
    assert spill.write(data.ctypes.data, data.nbytes) is None
    second = write(spill, source(BLOCK))
    assert spill.stats()["reserved_bytes"] == 3 * BLOCK
    del first
    spill.drain()
    assert_holds(write(spill, data).fetch(), data)
    assert_holds(second.fetch(), source(BLOCK))


@pytest.mark.parametrize("arena_bytes", [4096, BLOCK, 4 * BLOCK + 4096])
def test_a_tensor_larger_than_the_arena_comes_back(
    spill_dir: Path, engine: str, arena_bytes: int
) -> None:
    arena = native.Arena(arena_bytes)
    spill = open_spill(spill_dir, engine, arena)
    data = source(21 * BLOCK + 77, 5)
    extent = write(spill, data)
    extent.wait_written()
    assert not extent.prefetch()  # no room
    assert_holds(extent.fetch(), data)
    assert arena.stats()["peak_used_bytes"] <= arena.stats()["capacity_bytes"]


def test_a_buffer_outlives_its_extent_its_spill_and_its_arena(spill_dir: Path, engine: str) -> None:
    data = source(3 * BLOCK, 7)
    arena = native.Arena(64 * BLOCK)
    spill = open_spill(spill_dir, engine, arena)
    extent = write(spill, data)
    extent.wait_written()
    buffer = extent.fetch()
    tensor = native.tensor_over(buffer, torch.uint8)
    view = memoryview(buffer)
    spill.close()
    del arena, spill, extent
    gc.collect()
    assert_holds(buffer, data)
    del buffer
    gc.collect()
    assert bytes(view) == data.tobytes()
    assert tensor.numpy().tobytes() == data.tobytes()


def test_dropping_everything_in_flight_leaves_no_memory_and_no_space(
    spill_dir: Path, engine: str
) -> None:
    arena = native.Arena(64 * BLOCK)
    spill = open_spill(spill_dir, engine, arena)
    rng = random.Random(1)
    data = source(6 * BLOCK)
    for _ in range(200):
        extent = spill.write(data.ctypes.data, rng.randrange(1, data.nbytes))
        if rng.random() < 0.5:
            extent.prefetch()
        del extent
    spill.drain()
    assert spill.stats()["used_bytes"] == 0
    assert arena.stats()["used_bytes"] == 0


def test_closing_twice_is_harmless_and_writing_afterwards_refused(
    spill_dir: Path, engine: str
) -> None:
    spill = open_spill(spill_dir, engine)
    data = source(BLOCK)
    extent = write(spill, data)
    extent.wait_written()
    spill.close()
    spill.close()
    with pytest.raises(RuntimeError, match="closed"):
        spill.write(data.ctypes.data, data.nbytes)
    with pytest.raises(RuntimeError, match="closed"):
        extent.fetch()
    for limit in (0, 1 << 20):
        unused = open_spill(spill_dir, engine, spill_bytes=limit)
        unused.close()
        with pytest.raises(RuntimeError, match="closed"):
            unused.write(data.ctypes.data, data.nbytes)


def spill_descriptors(directory: Path) -> list[int]:
    links = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            links[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own descriptor
            continue
    return [fd for fd, link in links.items() if link.startswith(str(directory)) or "uring" in link]


@pytest.mark.parametrize("direct", [True, False])
def test_the_file_is_nameless_and_nobody_elses(spill_dir: Path, engine: str, direct: bool) -> None:
    umask = os.umask(0)
    try:
        spill = open_spill(spill_dir, engine, direct=direct)
    finally:
        os.umask(umask)
    extent = write(spill, source(BLOCK))
    extent.wait_written()
    assert list(spill_dir.iterdir()) == []
    files = [os.fstat(fd) for fd in spill_descriptors(spill_dir)]
    regular = [facts for facts in files if stat.S_ISREG(facts.st_mode)]
    assert [(stat.S_IMODE(facts.st_mode), facts.st_nlink) for facts in regular] == [(0o600, 0)]
    assert not any(os.get_inheritable(fd) for fd in spill_descriptors(spill_dir))
    spill.close()
    assert spill_descriptors(spill_dir) == []
    assert (spill.free_bytes, spill.page_cache_bytes()) == (0, 0)


def test_buffered_bytes_are_counted_in_the_page_cache_and_direct_ones_are_not(
    spill_dir: Path, engine: str
) -> None:
    for direct in (True, False):
        spill = open_spill(spill_dir, engine, direct=direct)
        extent = write(spill, source(4 * BLOCK))
        extent.wait_written()
        assert spill.page_cache_bytes() == (0 if spill.direct else 4 * BLOCK)
        assert spill.direct_reason


def test_a_directory_in_memory_says_so() -> None:
    path = Path("/dev/shm")
    if not path.is_dir() or not os.access(path, os.W_OK):
        pytest.skip("no /dev/shm here")
    facts = native.inspect_directory(path)
    assert (facts.filesystem, facts.backing) == ("tmpfs", "memory")
    spill = open_spill(path, "posix")
    assert spill.backing == "memory"


def test_a_wrong_path_is_the_right_os_error_with_its_name(spill_dir: Path) -> None:
    plain = spill_dir / "plain"
    plain.touch()
    for path, kind in ((spill_dir / "gone", FileNotFoundError), (plain, NotADirectoryError)):
        for open_it in (native.inspect_directory, lambda path: open_spill(path, "auto")):
            with pytest.raises(kind) as caught:
                open_it(path)
            assert caught.value.filename == str(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_bytes", 0),
        ("block_bytes", 4097),
        ("block_bytes", 4 << 30),
        ("queue_depth", 0),
        ("queue_depth", 5000),
        ("engine", "aio"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(
    spill_dir: Path, key: str, value: object
) -> None:
    settings = {"engine": "auto", "block_bytes": BLOCK} | {key: value}
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        native.Spill(str(spill_dir), native.Arena(BLOCK), **settings)
    assert spill_descriptors(spill_dir) == []


def drop_ipc_lock() -> None:
    """Give up the capability that lifts RLIMIT_MEMLOCK, which root has."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~(1 << 14)
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def test_a_memlock_limit_is_reported_and_costs_only_the_registration(
    spill_dir: Path, in_child: InChild
) -> None:
    if not native.probe_engines()["uring"][0]:
        pytest.skip("no io_uring here")

    def limited() -> tuple[bool, int, bool]:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        drop_ipc_lock()
        spill = open_spill(spill_dir, "uring")
        data = source(3 * BLOCK)
        extent = write(spill, data)
        extent.wait_written()
        return spill.registered, spill.registration_errno, bytes(extent.fetch()) == data.tobytes()

    registered, code, same = in_child(limited)
    assert not registered
    assert code in (errno.ENOMEM, errno.EPERM)
    assert same


def test_a_file_size_limit_fills_the_spill_instead_of_ending_the_process(
    spill_dir: Path, engine: str, in_child: InChild
) -> None:
    def limited() -> list[bool]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * BLOCK, 4 * BLOCK))
        spill = open_spill(spill_dir, engine)
        data = source(3 * BLOCK)
        extent = write(spill, data)
        refused = spill.write(data.ctypes.data, data.nbytes) is None
        extent.wait_written()
        return [refused, bytes(extent.fetch()) == data.tobytes()]

    assert in_child(limited) == [True, True]


def test_a_file_size_limit_below_one_page_is_an_os_error(
    spill_dir: Path, in_child: InChild
) -> None:
    if not native.inspect_directory(spill_dir).direct:
        pytest.skip("without O_DIRECT the first page is written later")

    def limited() -> int | None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        try:
            open_spill(spill_dir, "posix")
        except OSError as error:
            return error.errno
        return None

    assert in_child(limited) == errno.EFBIG
