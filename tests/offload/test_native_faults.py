"""The I/O core as Python sees it, on a drive that errs: the right bytes, or an error that names
operation, offset and length; the tensor kept in memory where the drive is full."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload import native

BLOCK = 8192
BLOCKS = 5
FOR_EVER = 1 << 30
# Staging that takes a tensor of BLOCKS blocks whole, or in a piece of four and one of one.
WHOLE, IN_PIECES = 64 * BLOCK, 4 * BLOCK


def rule(op: str, action: str, first: int = 0, count: int = 1, **more: float) -> native.FaultRule:
    return native.FaultRule(op=op, action=action, first=first, count=count, **more)


class Rig:
    """A spill on a scripted drive, and a tensor of `nbytes` random bytes."""

    def __init__(
        self,
        directory: Path,
        engine: str,
        *rules: native.FaultRule,
        arena_bytes: int = WHOLE,
        nbytes: int = BLOCKS * BLOCK,
        bytes_per_s: float = 0.0,
        verify: bool = True,
    ) -> None:
        self.arena = native.Arena(arena_bytes)
        self.spill = native.Spill(
            str(directory),
            self.arena,
            engine=engine,
            queue_depth=3,
            block_bytes=BLOCK,
            spill_bytes=16 << 20,
            verify=verify,
            fault_plan=native.FaultPlan(rules=rules, bytes_per_s=bytes_per_s),
        )
        # Page-aligned, so that the extent is exactly as long as the tensor.
        room = np.empty(nbytes + 4096, np.uint8)
        begin = -room.ctypes.data % 4096
        self.data = room[begin : begin + nbytes]
        self.data[:] = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)

    def write(self) -> native.Extent:
        extent = self.spill.write(self.data.ctypes.data, self.data.nbytes)
        assert extent is not None
        return extent

    def write_through(self) -> native.Extent:
        """Write until nothing of it is on its way."""
        extent = self.write()
        extent.wait_written()
        self.spill.drain()
        return extent

    def holds(self, buffer: native.Buffer) -> bool:
        return bytes(memoryview(buffer)) == self.data.tobytes()

    def assert_nothing_is_held(self) -> None:
        self.spill.drain()
        assert self.spill.stats()["used_bytes"] == 0
        assert self.spill.stats()["kept_bytes"] == 0
        assert self.arena.stats()["used_bytes"] == 0
        assert self.arena.stats()["outside_bytes"] == 0


@pytest.mark.parametrize("moved", [0, 1, 511, 512, 4095, 4096, 4097, BLOCK - 1])
@pytest.mark.parametrize("op", ["write", "read"])
def test_a_short_transfer_at_any_block_is_completed(
    spill_dir: Path, engine: str, op: str, moved: int
) -> None:
    for first in range(BLOCKS):
        rig = Rig(spill_dir, engine, rule(op, "short", first, nbytes=moved))
        extent = rig.write_through()
        assert rig.holds(extent.fetch())
        assert rig.spill.stats()["resumed"] == 1


@pytest.mark.parametrize("nbytes", [1, 511, 512, 4095, 4096, 4097, BLOCK - 1, BLOCK, BLOCK + 1])
def test_odd_lengths_survive_a_drive_that_is_always_short(
    spill_dir: Path, engine: str, nbytes: int
) -> None:
    rig = Rig(spill_dir, engine, rule("any", "short", 0, FOR_EVER, nbytes=4100), nbytes=nbytes)
    assert rig.holds(rig.write_through().fetch())


def test_a_drive_that_makes_no_progress_is_an_error(spill_dir: Path, engine: str) -> None:
    for fault in (
        rule("write", "short", 0, FOR_EVER, nbytes=0),
        rule("write", "error", 0, FOR_EVER, errno=errno.EAGAIN),
    ):
        rig = Rig(spill_dir, engine, fault)
        with pytest.raises(OSError, match="without progress") as caught:
            rig.write().wait_written()
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINTR])
def test_a_passing_error_passes(spill_dir: Path, engine: str, code: int) -> None:
    rig = Rig(spill_dir, engine, rule("any", "error", 2, 6, errno=code))
    assert rig.holds(rig.write_through().fetch())


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("arena_bytes", [WHOLE, IN_PIECES])
def test_eio_on_a_write_is_told_and_never_becomes_wrong_bytes(
    spill_dir: Path, engine: str, arena_bytes: int, verify: bool
) -> None:
    for first in range(BLOCKS):
        fault = rule("write", "error", first, errno=errno.EIO)
        rig = Rig(spill_dir, engine, fault, arena_bytes=arena_bytes, verify=verify)
        extent = rig.write()
        with pytest.raises(OSError, match=rf"write of {BLOCK} bytes at offset \d+") as caught:
            extent.wait_written()
        assert caught.value.errno == errno.EIO
        assert str(spill_dir) in str(caught.value.filename)
        with pytest.raises(OSError, match="write of"):
            rig.spill.raise_write_error()
        with pytest.raises(OSError, match="write of"):
            rig.write()
        extent.prefetch()
        with pytest.raises(OSError, match="write of"):
            extent.fetch()
        del extent
        rig.assert_nothing_is_held()


@pytest.mark.parametrize("ahead", [True, False])
def test_eio_on_a_read_is_told_where_and_the_next_read_may_work(
    spill_dir: Path, engine: str, ahead: bool
) -> None:
    for first in range(BLOCKS):
        rig = Rig(spill_dir, engine, rule("read", "error", first, errno=errno.EIO))
        extent = rig.write_through()
        if ahead:
            assert extent.prefetch()
        with pytest.raises(OSError, match=f"read of {BLOCK} bytes at offset {first * BLOCK} "):
            extent.fetch()
        assert rig.holds(extent.fetch())
        del extent
        rig.assert_nothing_is_held()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("arena_bytes", [WHOLE, IN_PIECES])
def test_a_drive_full_at_any_block_keeps_the_tensor_in_memory(
    spill_dir: Path, engine: str, arena_bytes: int, code: int
) -> None:
    for first in range(BLOCKS):
        fault = rule("write", "error", first, errno=code)
        rig = Rig(spill_dir, engine, fault, arena_bytes=arena_bytes)
        extent = rig.write_through()
        kept = BLOCKS * BLOCK
        if arena_bytes == IN_PIECES:
            kept = 4 * BLOCK if first < 4 else BLOCK
        assert rig.spill.stats()["kept_bytes"] == kept
        assert rig.arena.stats()["used_bytes"] == 0  # not at staging's expense
        rig.spill.raise_write_error()  # being full is no lost tensor
        extent.prefetch()
        assert rig.holds(extent.fetch())
        del extent
        rig.assert_nothing_is_held()


@pytest.mark.parametrize("op", ["write", "read"])
@pytest.mark.parametrize("at", [0, 1, 4095, BLOCK - 1])
def test_a_changed_byte_is_ebadmsg_naming_offset_and_extent(
    spill_dir: Path, engine: str, op: str, at: int
) -> None:
    for first in range(BLOCKS):
        rig = Rig(spill_dir, engine, rule(op, "corrupt", first, nbytes=at))
        ballast = rig.write_through() if op == "read" else None
        extent = rig.write_through()
        with pytest.raises(OSError, match="returned other bytes") as caught:
            extent.fetch()
        assert caught.value.errno == errno.EBADMSG
        message = str(caught.value)
        assert f"bytes at offset {extent.offset + first * BLOCK} " in message
        assert f"extent at {extent.offset}, {BLOCKS * BLOCK} bytes" in message
        del extent, ballast
        rig.assert_nothing_is_held()


def test_forwarded_bytes_are_the_tensors_own_though_the_drive_got_others(
    spill_dir: Path, engine: str
) -> None:
    rig = Rig(
        spill_dir,
        engine,
        rule("write", "delay", 0, FOR_EVER, delay_s=0.05),
        rule("write", "corrupt", 0, FOR_EVER, nbytes=9),
    )
    buffer = rig.write().fetch()
    assert buffer.forwarded
    assert rig.holds(buffer)


def test_a_bandwidth_limit_holds_transfers_back(spill_dir: Path, engine: str) -> None:
    rate = 1 << 20
    rig = Rig(spill_dir, engine, bytes_per_s=rate)
    begin = time.monotonic()
    extent = rig.write_through()
    assert rig.holds(extent.fetch())
    # A bound that the limit itself sets: no machine is too slow for it.
    assert time.monotonic() - begin >= 2 * BLOCKS * BLOCK / rate


def test_delays_reorder_completions_and_not_bytes(spill_dir: Path, engine: str) -> None:
    delays = [rule("any", "delay", n, delay_s=0.002 * (n % 3)) for n in range(30)]
    rig = Rig(spill_dir, engine, *delays)
    extents = [rig.write() for _ in range(4)]
    for extent in reversed(extents):
        extent.wait_written()
        assert rig.holds(extent.fetch())


def test_discarding_moves_nothing_and_succeeds(spill_dir: Path, engine: str) -> None:
    arena = native.Arena(WHOLE)
    plan = native.FaultPlan(discard=True)
    spill = native.Spill(str(spill_dir), arena, engine=engine, verify=False, fault_plan=plan)
    data = np.ones(3 * BLOCK, np.uint8)
    extent = spill.write(data.ctypes.data, data.nbytes)
    assert extent is not None
    extent.wait_written()
    assert extent.fetch().nbytes == data.nbytes
    assert spill.engine == f"fault:{engine}"


@pytest.mark.parametrize(("key", "value"), [("op", "erase"), ("action", "explode")])
def test_a_rule_that_means_nothing_is_refused(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be .* not '{value}'"):
        native.FaultRule(**{key: value})


faults = st.builds(
    native.FaultRule,
    op=st.sampled_from(["read", "write", "any"]),
    action=st.sampled_from(["error", "short", "corrupt"]),
    first=st.integers(0, 40),
    count=st.integers(1, 3),
    errno=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EAGAIN, errno.EINTR, errno.EDQUOT]),
    nbytes=st.integers(0, 9000),
)


@settings(
    derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rules=st.lists(faults, max_size=10),
    sizes=st.lists(st.integers(1, 10 * BLOCK), min_size=1, max_size=6),
    arena_blocks=st.integers(1, 30),
    ahead=st.booleans(),
)
def test_any_script_ends_in_the_right_bytes_or_an_os_error(
    spill_dir: Path,
    engine: str,
    rules: list[native.FaultRule],
    sizes: list[int],
    arena_blocks: int,
    ahead: bool,
) -> None:
    rig = Rig(spill_dir, engine, *rules, arena_bytes=arena_blocks * BLOCK, nbytes=10 * BLOCK)
    extents = []
    for nbytes in sizes:
        try:
            extents.append(rig.spill.write(rig.data.ctypes.data, nbytes))
        except OSError as error:
            assert error.errno == errno.EIO  # noqa: PT017  # of an earlier one
            break
    extent = None
    for extent, nbytes in zip(extents, sizes, strict=False):
        assert extent is not None
        if ahead:
            extent.prefetch()
        try:
            fetched = bytes(extent.fetch())
        except OSError as error:
            expected = (errno.EIO, errno.EBADMSG, errno.ENOSPC, errno.EDQUOT)
            assert error.errno in expected  # noqa: PT017
        else:
            assert fetched == rig.data[:nbytes].tobytes()
    del extent
    extents.clear()
    rig.assert_nothing_is_held()
