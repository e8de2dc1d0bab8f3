"""The ssd tier: bytes go out to nameless files in one or several directories, and come back."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.config import ActivationsConfig
from offload.native import Extent, FaultPlan, FaultRule
from offload.tiers import SsdTier
from offload.tiers.ssd import by_load

MIB = 1 << 20
Open = Callable[..., SsdTier]


@pytest.fixture
def open_tier(spill_dir: Path) -> Iterator[Open]:
    opened: list[SsdTier] = []

    def open_one(faults: FaultPlan | None = None, **settings: Any) -> SsdTier:
        chosen: dict[str, Any] = {
            "path": (str(spill_dir),),
            "staging_bytes": 4 * MIB,
            "spill_bytes": 16 * MIB,
        } | settings
        opened.append(SsdTier(ActivationsConfig(**chosen), faults))
        return opened[-1]

    yield open_one
    for tier in opened:
        tier.close()


def data(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def write(tier: SsdTier, tensor: torch.Tensor) -> Extent:
    extent = tier.write(tensor.data_ptr(), tensor.nbytes)
    assert extent is not None
    return extent


def read(extent: Extent) -> bytes:
    return bytes(memoryview(extent.fetch()))


@pytest.mark.parametrize("nbytes", [1, 511, 512, 513, 4095, 4096, 4097, MIB + 1, 5 * MIB])
def test_bytes_come_back(open_tier: Open, engine: str, nbytes: int) -> None:
    tier = open_tier(io_engine=engine)
    tensor = data(nbytes)
    extent = write(tier, tensor)
    expected = tensor.numpy().tobytes()
    tensor.zero_()  # it is the caller's again
    tier.drain()
    assert read(extent) == expected


def test_directories_take_turns_and_share_one_arena(open_tier: Open, spill_dir: Path) -> None:
    folders = [spill_dir / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    tier = open_tier(path=tuple(map(str, folders)))
    tensors = [data(4096, seed) for seed in range(6)]
    extents = [write(tier, tensor) for tensor in tensors]
    tier.drain()
    assert [spill.stats()["write_bytes"] for spill in tier._spills] == [8192] * 3
    for tensor, extent in zip(tensors, extents, strict=True):
        assert read(extent) == tensor.numpy().tobytes()
    assert tier.counters()["capacity_bytes"] == 4 * MIB


def test_a_full_directory_leaves_it_to_the_next_and_then_there_is_no_space(
    open_tier: Open, spill_dir: Path
) -> None:
    folders = [spill_dir / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    tier = open_tier(path=tuple(map(str, folders)), spill_bytes=2 * 4096)
    tensor = data(4096)
    extents = [write(tier, tensor) for _ in range(4)]
    assert tier.write(tensor.data_ptr(), 4096) is None
    extents.pop()
    tier.drain()
    assert tier.write(tensor.data_ptr(), 4096) is not None


def test_space_comes_back_when_an_extent_is_dropped(open_tier: Open) -> None:
    tier = open_tier()
    for _ in range(10):
        extent = write(tier, data(3 * MIB))
        tier.drain()
        assert tier.counters()["spill_used_bytes"] == 3 * MIB
        del extent
        assert tier.counters()["spill_used_bytes"] == 0
    assert tier.counters()["spill_peak_used_bytes"] == 3 * MIB


def test_a_directory_that_cannot_be_used_leaves_nothing_open(
    open_tier: Open, spill_dir: Path
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    missing = spill_dir / "missing"
    with pytest.raises(FileNotFoundError, match="missing"):
        open_tier(path=(str(spill_dir), str(missing)))
    assert len(os.listdir("/proc/self/fd")) == before
    assert not list(spill_dir.iterdir())


def test_the_spill_file_has_no_name_and_no_other_reader(open_tier: Open, spill_dir: Path) -> None:
    tier = open_tier()
    write(tier, data(4096))
    tier.drain()
    assert list(spill_dir.iterdir()) == []
    ours = []
    for number in os.listdir("/proc/self/fd"):
        link = f"/proc/self/fd/{number}"
        if os.path.islink(link) and os.readlink(link).startswith(str(spill_dir)):
            ours.append(os.stat(link))
    assert [stat.st_mode & 0o777 for stat in ours] == [0o600]
    assert ours[0].st_nlink == 0


def test_what_a_full_drive_leaves_in_memory_is_counted_while_it_lives(open_tier: Open) -> None:
    rule = FaultRule(op="write", count=1000, errno=errno.ENOSPC)
    tier = open_tier(FaultPlan(rules=[rule]))
    tensor = data(2 * MIB)
    extent = write(tier, tensor)
    tier.drain()
    assert tier.kept_bytes() == 2 * MIB
    assert read(extent) == tensor.numpy().tobytes()
    del extent
    assert tier.kept_bytes() == 0
    assert tier.counters()["kept_total_bytes"] == 2 * MIB


def test_the_first_failed_write_is_raised_until_the_end(open_tier: Open, spill_dir: Path) -> None:
    tier = open_tier(FaultPlan(rules=[FaultRule(op="write", first=1, count=1)]))
    tier.raise_write_error()
    extents = [write(tier, data(4096)) for _ in range(3)]
    tier.drain()
    for _ in range(2):
        with pytest.raises(OSError, match="write") as caught:
            tier.raise_write_error()
        assert caught.value.errno == errno.EIO
        assert str(caught.value.filename).startswith(str(spill_dir))
    assert len(extents) == 3


def test_a_directory_that_will_not_close_does_not_keep_the_others_open(open_tier: Open) -> None:
    class Stubborn:
        def close(self) -> None:
            raise OSError(errno.EIO, "it will not close")

    tier = open_tier()
    stubborn: Any = Stubborn()
    tier._spills.append(stubborn)
    with pytest.raises(OSError, match="will not close"):
        tier.close()
    tier._spills.remove(stubborn)
    with pytest.raises(RuntimeError, match="closed"):
        write(tier, data(4096))


def test_closing_twice_is_closing_once(open_tier: Open) -> None:
    tier = open_tier()
    extent = write(tier, data(MIB))
    tier.close()
    tier.close()
    del extent
    assert tier.counters()["spill_used_bytes"] == 0


def test_the_facts_name_the_path_of_transfers(open_tier: Open, engine: str) -> None:
    facts = open_tier(io_engine=engine, verify=False, direct=False).facts()
    assert facts.io_engine == engine
    assert facts.io_engine_reason
    assert not facts.direct
    assert facts.direct_reason
    assert facts.backing == "disk"
    assert facts.verify is False


def test_a_directory_in_memory_is_recorded_as_such(open_tier: Open) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm here")
    assert open_tier(path=("/dev/shm",), spill_bytes=MIB).facts().backing == "memory"


def test_a_day_has_no_more_writes_than_allowed(open_tier: Open) -> None:
    tier = open_tier(ssd_write_bytes_per_day=24 * 3 * MIB)  # an hour's worth may go at once
    tensor = data(MIB)
    extents = [tier.write(tensor.data_ptr(), tensor.nbytes) for _ in range(5)]
    assert [extent is not None for extent in extents] == [True] * 3 + [False] * 2
    assert extents[0] is not None
    assert read(extents[0]) == tensor.numpy().tobytes()
    assert "ssd_write_bytes_per_day" in "; ".join(tier.why_full())
    assert tier.write_bytes_per_s() == pytest.approx(23 * 3 * MIB / 86_400)


def test_each_directory_has_its_own_day_whatever_the_sizes_and_whichever_is_full(
    open_tier: Open, spill_dir: Path
) -> None:
    paths = tuple(str(spill_dir / name) for name in "ab")
    for path in paths:
        os.mkdir(path)
    limit = 3 * MIB  # of an hour
    tier = open_tier(path=paths, ssd_write_bytes_per_day=24 * limit)
    held = []
    for number in range(12):  # every other one is large
        tensor = data(MIB if number % 2 else 4096)
        held.append(tier.write(tensor.data_ptr(), tensor.nbytes))
    tier.drain()
    assert sum(extent is not None for extent in held) >= 8
    assert all(spill.stats()["write_bytes"] <= limit for spill in tier._spills)


def test_a_day_is_not_used_up_by_what_found_no_space_and_counts_what_pads(open_tier: Open) -> None:
    tier = open_tier(spill_bytes=MIB, ssd_write_bytes_per_day=24 * (MIB + 2 * 4096))
    first = tier.write(data(MIB).data_ptr(), MIB)
    assert first is not None
    for _ in range(3):
        assert tier.write(data(4096).data_ptr(), 4096) is None, "the spill is full"
    del first
    tier.drain()
    small = data(100)
    written = [tier.write(small.data_ptr(), small.nbytes) for _ in range(3)]
    assert [extent is not None for extent in written] == [True, True, False]


def test_several_directories_may_be_written_to_as_much_each(
    open_tier: Open, spill_dir: Path
) -> None:
    paths = tuple(str(spill_dir / name) for name in "ab")
    for path in paths:
        os.mkdir(path)
    tier = open_tier(path=paths, ssd_write_bytes_per_day=24 * 2 * MIB)
    tensor = data(MIB)
    written = [tier.write(tensor.data_ptr(), tensor.nbytes) for _ in range(6)]
    assert sum(extent is not None for extent in written) == 4


@pytest.mark.parametrize("together", [False, True])
def test_what_both_directions_move_while_both_are_under_way_is_counted(
    open_tier: Open, together: bool
) -> None:
    # The second write is slow, and the read begins beside it or after it.
    slow = FaultRule(op="write", first=1, count=1, action="delay", delay_s=0.2)
    tier = open_tier(FaultPlan(rules=[slow]))
    tensors = [data(MIB, seed) for seed in range(2)]
    first = write(tier, tensors[0])
    tier.drain()
    second = write(tier, tensors[1])
    tier.flush()
    if not together:
        tier.drain()
    assert read(first) == tensors[0].numpy().tobytes()
    tier.drain()
    written, read_back, mixed = tier.transferred()
    assert written[0] == 2 * MIB
    assert read_back[0] == MIB
    if together:
        # The read's own, and not the write's, which ended alone.
        assert mixed[0] == MIB
        assert 0 < mixed[1] <= min(written[1], read_back[1])
    else:
        assert mixed == (0, 0)
    assert read(second) == tensors[1].numpy().tobytes()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 1))
def test_directories_hold_bytes_by_their_bandwidth_once_it_is_known(
    speeds: list[int], known: int
) -> None:
    used = [0] * len(speeds)
    for _ in range(600):
        stats = [
            {
                "used_bytes": held,
                "read_bytes": known << 30,
                "write_bytes": 0,
                "read_busy_s": 2 / speed,
                "write_busy_s": 1 / speed,
                "mixed_busy_s": 2 / speed,
            }
            for held, speed in zip(used, speeds, strict=True)
        ]
        used[by_load(stats)[0]] += 1
    weights = speeds if known else [1] * len(speeds)
    for held, weight in zip(used, weights, strict=True):
        assert abs(held - 600 * weight / sum(weights)) <= len(speeds)
