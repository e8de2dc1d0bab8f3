"""Whatever the drive does, a gradient is right or there is an OSError."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.native import FaultPlan, FaultRule

SIZE = 64
NBYTES = SIZE * SIZE * 4
BLOCK = 4096
STEPS = 5
REGIONS = 2 * STEPS  # of `chain` below, of four blocks each
ALL = 1 << 40


def faults(**rule: Any) -> FaultPlan:
    return FaultPlan(rules=[FaultRule(**rule)])


def chain(run: Any) -> list[torch.Tensor]:
    weights = [torch.randn(SIZE, SIZE, requires_grad=True) for _ in range(STEPS)]
    with run.forward():
        y = torch.randn(SIZE, SIZE)
        for weight in weights:
            y = (y * weight).sin()
    loss = y.sum()
    del y
    run.written()
    loss.backward()
    return [weight.grad for weight in weights]


@pytest.fixture
def bound(make: Any) -> Any:
    """Make instances that write each block by itself and read it by itself."""
    return lambda plan, **settings: make(
        io_engine=plan, block_bytes=BLOCK, **{"staging_bytes": 64 * NBYTES} | settings
    )


@pytest.mark.parametrize("nth", range(4 * (REGIONS + 2)))
def test_a_full_drive_at_any_block_keeps_the_tensor_with_the_right_bits(
    bound: Any, same_bits: Any, nth: int
) -> None:
    act = bound(faults(op="write", first=nth, count=1, errno=errno.ENOSPC))
    same_bits(act, chain)
    assert act.stats().kept_bytes in (0, NBYTES, 2 * NBYTES)
    act.transfers.drain()
    assert act._stores.kept_bytes() == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("first", [0, 3, 17])
def test_a_drive_that_stays_full_keeps_the_rest(
    bound: Any, same_bits: Any, code: int, first: int
) -> None:
    act = bound(faults(op="write", first=first, count=ALL, errno=code))
    same_bits(act, chain)
    assert act.stats().kept_bytes >= (REGIONS - 1 - first // 4) * NBYTES


@pytest.mark.parametrize("staging", [BLOCK, 3 * BLOCK, 2 * NBYTES])
def test_a_full_drive_and_a_small_arena_give_the_right_bits(
    bound: Any, same_bits: Any, staging: int
) -> None:
    plan = faults(op="write", first=2, count=7, errno=errno.ENOSPC)
    same_bits(bound(plan, staging_bytes=staging), chain)


@pytest.mark.parametrize("spill", [1, 4096, NBYTES, 3 * NBYTES + 4096, 6 * NBYTES])
def test_a_small_spill_keeps_what_does_not_fit_and_counts_it(
    make: Any, same_bits: Any, spill: int
) -> None:
    act = make(spill_bytes=spill)
    with pytest.warns(RuntimeWarning, match=r"\(spill_bytes\).* free on the drive") as said:
        same_bits(act, chain)
    assert [warning.filename for warning in said] == [__file__], "once is enough"
    stats = act.stats()
    assert stats.spill_peak_bytes <= spill
    assert stats.kept_bytes >= (REGIONS - spill // NBYTES) * NBYTES
    assert act.counters.kept_now == 0
    same_bits(act, chain)  # and the next step begins afresh
    assert act.stats().kept_bytes == 2 * stats.kept_bytes


def test_a_drive_found_full_after_the_forward_is_told_once(bound: Any, same_bits: Any) -> None:
    act = bound(faults(op="write", count=ALL, errno=errno.ENOSPC))
    with pytest.warns(RuntimeWarning, match=r"are free on the drive.*stay in memory") as said:
        [same_bits(act, chain) for _ in range(3)]
    assert len(said) == 1


def test_a_full_spill_whose_directory_is_gone_is_told_and_the_step_ends_right(
    make: Any, same_bits: Any, spill_dir: Path
) -> None:
    directory = spill_dir / "gone"
    directory.mkdir()
    act = make(path=directory, spill_bytes=2 * NBYTES)
    directory.rmdir()
    with pytest.warns(RuntimeWarning, match="gone: .* are free on the drive"):
        same_bits(act, chain)
    assert act.stats().kept_bytes > 0


@pytest.mark.parametrize("schedule", ["all", "auto"])
def test_what_may_not_be_written_today_stays_and_is_told(
    make: Any, same_bits: Any, schedule: str
) -> None:
    act = make(ssd_write_bytes_per_day=24 * 4 * NBYTES, schedule=schedule)
    with pytest.warns(RuntimeWarning, match="ssd_write_bytes_per_day"):
        [same_bits(act, chain) for _ in range(4)]
    act.transfers.drain()
    assert 0 < act.stats().ssd_write_bytes <= 4 * NBYTES + BLOCK
    assert act.stats().kept_bytes + act.stats().scheduled_to_stay_bytes >= 3 * REGIONS * NBYTES


@pytest.mark.parametrize("kind", ["spill_bytes", "drive"])
def test_keeping_more_than_keep_bytes_is_enospc(make: Any, bound: Any, kind: str) -> None:
    if kind == "spill_bytes":
        act = make(spill_bytes=1, keep_bytes=2 * NBYTES)
    else:
        act = bound(faults(op="write", count=ALL, errno=errno.ENOSPC), keep_bytes=2 * NBYTES)
    weights = [torch.randn(SIZE, SIZE, requires_grad=True) for _ in range(30)]

    def forward() -> None:
        with act.forward():
            y = torch.randn(SIZE, SIZE)
            for weight in weights:
                y = (y * weight).sin()
                act.transfers.drain()

    with pytest.raises(OSError, match="keep_bytes=32768") as caught:
        forward()
    assert caught.value.errno == errno.ENOSPC


def test_within_keep_bytes_the_step_ends_right(make: Any, same_bits: Any) -> None:
    act = make(spill_bytes=1, keep_bytes=REGIONS * NBYTES + NBYTES)
    for _ in range(3):
        same_bits(act, chain)


@pytest.mark.parametrize("nth", range(0, 4 * REGIONS, 5))
def test_a_failed_write_is_an_error_and_never_a_wrong_gradient(
    bound: Any, same_bits: Any, nth: int
) -> None:
    act = bound(faults(op="write", first=nth, count=1))
    with pytest.raises(OSError, match="write") as caught:
        same_bits(act, chain)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="write"):  # what was lost stays lost
        same_bits(act, chain)


@pytest.mark.parametrize("nth", range(0, 4 * REGIONS, 5))
def test_a_failed_read_is_an_error_and_the_graph_can_be_tried_again(
    bound: Any, same_bits: Any, nth: int
) -> None:
    act = bound(faults(op="read", first=nth, count=1))
    with pytest.raises(OSError, match="read") as caught:
        same_bits(act, chain)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename
    same_bits(act, chain)


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("nth", [0, 1, 7, 20])
def test_a_changed_byte_is_an_error_naming_its_place(
    bound: Any, same_bits: Any, op: str, nth: int
) -> None:
    act = bound(faults(op=op, first=nth, count=1, action="corrupt"))
    with pytest.raises(OSError, match=r"offset \d+ returned other bytes.*extent at \d+"):
        same_bits(act, chain)


@pytest.mark.parametrize("nbytes", [1, 511, 512, 4095])
@pytest.mark.parametrize("op", ["read", "write"])
def test_short_transfers_are_resumed(bound: Any, same_bits: Any, op: str, nbytes: int) -> None:
    act = bound(faults(op=op, first=1, count=3, action="short", nbytes=nbytes))
    same_bits(act, chain)
    assert act._stores.counters()["resumed"] > 0


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_drive_that_moves_nothing_is_an_error(bound: Any, same_bits: Any, op: str) -> None:
    act = bound(faults(op=op, first=1, count=ALL, action="short", nbytes=0))
    with pytest.raises(OSError, match=op):
        same_bits(act, chain)


@pytest.mark.parametrize("op", ["read", "write", "any"])
def test_delays_change_nothing(bound: Any, same_bits: Any, op: str) -> None:
    act = bound(faults(op=op, first=0, count=ALL, action="delay", delay_s=0.005))
    for _ in range(2):
        same_bits(act, chain)


def test_a_slow_drive_changes_nothing(bound: Any, same_bits: Any) -> None:
    act = bound(FaultPlan(bytes_per_s=4e6), staging_bytes=3 * NBYTES)
    same_bits(act, chain)
    assert act.stats().stall_s > 0


def test_what_is_still_being_written_is_forwarded_and_not_read(make: Any, same_bits: Any) -> None:
    plan = faults(op="write", count=ALL, action="delay", delay_s=0.5)
    act = make(io_engine=plan, staging_bytes=64 * NBYTES)

    def compute(run: Any) -> list[torch.Tensor]:
        weights = [torch.randn(SIZE, SIZE, requires_grad=True) for _ in range(STEPS)]
        with run.forward():
            y = torch.randn(SIZE, SIZE)
            for weight in weights:
                y = (y * weight).sin()
            loss = y.sum()
            del y
        loss.backward()
        return [weight.grad for weight in weights]

    same_bits(act, compute)
    stats = act.stats()
    assert stats.forwarded_bytes == stats.offloaded_bytes == REGIONS * NBYTES
    assert stats.reloaded_bytes == stats.ssd_read_bytes == 0


def test_a_write_not_begun_is_cancelled(make: Any, same_bits: Any) -> None:
    plan = faults(op="write", count=ALL, action="delay", delay_s=0.2)
    act = make(io_engine=plan, staging_bytes=64 * NBYTES, queue_depth=1)

    def compute(run: Any) -> list[torch.Tensor]:
        w = torch.randn(SIZE, SIZE, requires_grad=True)
        with run.forward():
            y = w
            for _ in range(10):
                y = (y * 1.5).sin()
            loss = y.sum()
            del y
        loss.backward()
        return [w.grad]

    same_bits(act, compute)
    stats = act.stats()
    assert act._stores.counters()["cancelled_bytes"] > 0
    act.transfers.drain()
    assert act.stats().ssd_write_bytes < stats.offloaded_bytes
    assert act.stats().spill_bytes == 0


def test_without_verifying_a_changed_byte_goes_unnoticed(bound: Any, same_bits: Any) -> None:
    act = bound(faults(op="read", first=0, count=ALL, action="corrupt"), verify=False)
    with pytest.raises(AssertionError):  # the fault is real: it is verifying that finds it
        same_bits(act, chain)
    assert act.stats().verify is False


def test_closing_with_writes_under_way_ends_them(make: Any) -> None:
    plan = faults(op="write", count=ALL, action="delay", delay_s=0.05)
    act = make(io_engine=plan, staging_bytes=64 * NBYTES)
    w = torch.randn(SIZE, SIZE, requires_grad=True)
    with act.forward():
        y = (w * 2).sin().exp()
    act.close()
    with pytest.raises(RuntimeError, match="closed"):
        y.sum().backward()
    assert act.stats().spill_bytes == 0
