"""The report adds up: every saved byte is counted once, where it went."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import offload

SIZE = 64
NBYTES = SIZE * SIZE * 4


def step(act: Any, count: int = 4, drained: bool = True) -> None:
    w = torch.randn(SIZE, SIZE, requires_grad=True)
    with act.forward():
        y = w
        for _ in range(count):
            y = y.sin()
        loss = y.sum()
        del y
    if drained:
        act.transfers.drain()
    loss.backward()


def test_bytes_read_and_written_are_those_that_left_and_came_back(make: Any, engine: str) -> None:
    act = make(io_engine=engine)
    for count in (1, 2):
        step(act)
        stats = act.stats()
        # The first sine saves the leaf.
        assert stats.passed_through_bytes == {"parameter": count * NBYTES}
        assert stats.offloaded_bytes == stats.reloaded_bytes == count * 3 * NBYTES
        assert stats.ssd_write_bytes == stats.ssd_read_bytes == stats.offloaded_bytes
    assert stats.kept_bytes == stats.forwarded_bytes == stats.recast_bytes == 0
    assert stats.spill_bytes == 0
    assert 3 * NBYTES <= stats.spill_peak_bytes <= 6 * NBYTES


def test_what_the_caller_still_holds_is_told(make: Any) -> None:
    act = make()
    w = torch.randn(SIZE, SIZE, requires_grad=True)
    with act.forward():
        held = w.sin()
        loss = held.sin().sin().sum()
    assert act.stats().still_held_bytes == NBYTES
    act.transfers.drain()
    loss.backward()
    stats = act.stats()
    assert (stats.forwarded_bytes, stats.reloaded_bytes) == (NBYTES, NBYTES)
    assert held is not None


def test_a_snapshot_does_not_change_later(make: Any) -> None:
    act = make()
    before = act.stats()
    step(act)
    assert before.offloaded_bytes == 0
    assert dict(before.passed_through_bytes) == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.offloaded_bytes = 1
    with pytest.raises(TypeError):
        before.passed_through_bytes["small"] = 1  # type: ignore[index]


def test_native_memory_stays_within_the_arena(make: Any) -> None:
    act = make(staging_bytes=4 * NBYTES)
    for drained in (True, False):
        step(act, 12, drained)
    stats = act.stats()
    assert 0 < stats.staging_peak_bytes <= 4 * NBYTES
    assert stats.native_bytes <= stats.native_peak_bytes


def test_the_path_taken_is_told(make: Any, engine: str) -> None:
    stats = make(io_engine=engine, verify=False).stats()
    assert stats.io_engine == engine
    assert stats.io_engine_reason
    assert stats.backing == "disk"
    assert stats.verify is False
    assert isinstance(stats.registered_buffers, bool)
    assert stats.direct_reason


def test_without_o_direct_the_report_says_so_and_counts_the_page_cache(make: Any) -> None:
    act = make(direct=False)
    step(act)
    stats = act.stats()
    assert stats.direct is False
    assert stats.direct_reason
    assert stats.page_cache_bytes > 0


def test_with_o_direct_the_page_cache_stays_empty(make: Any) -> None:
    act = make()
    if not act.stats().direct:
        pytest.skip(act.stats().direct_reason)
    step(act)
    assert act.stats().page_cache_bytes == 0


def test_a_script_of_faults_is_told(make: Any) -> None:
    assert make(io_engine=offload.native.FaultPlan()).stats().io_engine.startswith("fault:")


def test_the_life_of_a_drive_follows_from_what_a_day_would_write(
    make: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert make().stats().ssd_life_days is None
    rated, places = 10**15, [str(tmp_path_factory.mktemp("drive")) for _ in range(2)]
    act = make(path=places, ssd_rated_bytes=rated, ssd_write_amplification=2.0)
    assert act.stats().ssd_life_days == math.inf
    step(act)
    stats = act.stats()
    elapsed_s = 86400 * stats.ssd_write_bytes / stats.ssd_write_bytes_a_day
    assert 0 < elapsed_s < 600
    # Two directories of one file system are one drive.
    assert stats.ssd_life_days == pytest.approx(rated / (2 * stats.ssd_write_bytes_a_day))
    act._stores.ssd._drives = [1, 2]
    written = [spill.stats()["write_bytes"] for spill in act._stores.ssd._spills]
    assert min(written) > 0
    life = act.stats()
    assert life.ssd_life_days is not None
    worst = life.ssd_write_bytes_a_day * max(written) / sum(written)
    assert life.ssd_life_days == pytest.approx(rated / (2 * worst))
    act.close()
    assert act.stats().ssd_life_days == act.stats().ssd_life_days, "time after the end adds nothing"
    assert act.stats().ssd_write_bytes_a_day > 0


def test_every_count_is_there_after_close(make: Any) -> None:
    act = make()
    step(act)
    act.close()
    assert act.stats().offloaded_bytes == 3 * NBYTES
    assert act.stats().spill_bytes == 0
