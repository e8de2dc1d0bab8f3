"""The direct way of the ssd tier, on the emulated device: no staging, every failure an error."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offload.config import ActivationsConfig
from offload.device import DirectFile, EmulatedLink, require_direct
from offload.device.emulated import EmulatedFile
from offload.tiers import DirectExtent, SsdTier

NBYTES = 3 * 4096 + 77
Act = Callable[[int], int]


class Scripted(EmulatedFile):
    """Moves as many bytes as `act` says of those asked for, or raises what it raises."""

    act: Act = staticmethod(lambda nbytes: nbytes)

    def write(self, source: torch.Tensor, offset: int) -> int:
        return super().write(source[: self.act(source.nbytes)], offset)

    def read(self, target: torch.Tensor, offset: int) -> int:
        return super().read(target[: self.act(target.nbytes)], offset)


class Link(EmulatedLink):
    """Reaches files as `act` says."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.act = act
        self.files: list[Scripted] = []

    def direct_file(self, descriptor: int) -> DirectFile:
        file = Scripted(descriptor)
        file.act = self.act
        self.files.append(file)
        return file


def opened(*directories: Path, act: Act = lambda nbytes: nbytes, **settings: object) -> SsdTier:
    config = ActivationsConfig(path=tuple(map(str, directories)), gds=True, **settings)  # type: ignore[arg-type]
    tier = SsdTier(config)
    tier.open_direct_way(Link(act))
    return tier


def staged(tier: SsdTier, nbytes: int = NBYTES) -> DirectExtent:
    extent = tier.stage(nbytes, 0)
    assert isinstance(extent, DirectExtent)
    return extent


def random_bytes(nbytes: int = NBYTES, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("most", [1 << 30, 4096, 1000])
def test_bytes_come_back_though_transfers_are_cut_short(spill_dir: Path, most: int) -> None:
    tier = opened(spill_dir, act=lambda nbytes: min(nbytes, most))
    extents, sources = [staged(tier) for _ in range(3)], [random_bytes(seed=n) for n in range(3)]
    writes = [extent.write_from(*both, []) for extent, *both in zip(extents, sources, strict=True)]
    for extent, source, written in zip(extents, sources, writes, strict=True):
        target = torch.zeros_like(source)
        extent.read_into(target, [written]).synchronize()
        assert torch.equal(target, source)
    counters = tier.counters()
    assert counters["write_bytes"] == counters["read_bytes"] == 3 * NBYTES
    assert counters["peak_used_bytes"] == 0, "nothing is staged"
    facts = tier.facts()
    assert (facts.io_engine, facts.verify) == ("gds", False)
    tier.close()


def test_space_is_counted_limited_and_given_back(spill_dir: Path) -> None:
    tier = opened(spill_dir, spill_bytes=2 * 16384)
    held = [staged(tier), staged(tier)]
    assert tier.stage(NBYTES, 0) is None
    assert tier.counters()["spill_used_bytes"] == 2 * 16384
    del held[0]
    held.append(staged(tier))
    held.clear()
    assert tier.counters()["spill_used_bytes"] == 0
    tier.close()


def test_an_extent_dropped_while_it_is_written_keeps_its_space_until_then(spill_dir: Path) -> None:
    go = threading.Event()

    def wait(nbytes: int) -> int:
        go.wait()
        return nbytes

    tier = opened(spill_dir, act=wait)
    written = staged(tier).write_from(random_bytes(), [])
    assert tier.counters()["spill_used_bytes"] > 0
    assert not written.query()
    go.set()
    tier.drain()
    assert tier.counters()["spill_used_bytes"] == 0
    tier.close()


@pytest.mark.parametrize("moved", [0, -1])
def test_a_failed_write_is_an_error_from_then_on(spill_dir: Path, moved: int) -> None:
    def fail(nbytes: int) -> int:
        if moved:
            raise OSError(errno.EIO, "no")
        return 0

    tier = opened(spill_dir, act=fail)
    written = staged(tier).write_from(random_bytes(), [])
    with pytest.raises(OSError, match="no" if moved else f"{NBYTES} bytes at 0 ended after 0"):
        written.synchronize()
    with pytest.raises(OSError, match="no" if moved else "ended after"):
        tier.raise_write_error()
    tier.close()


def test_a_read_waits_for_its_write_and_fails_with_it(spill_dir: Path) -> None:
    tier = opened(spill_dir, act=lambda nbytes: 0)
    extent = staged(tier)
    read = extent.read_into(
        torch.zeros(NBYTES, dtype=torch.uint8), [extent.write_from(random_bytes(), [])]
    )
    with pytest.raises(OSError, match="ended after 0"):
        read.hold()
    assert tier.stall_s() > 0
    tier.close()


def test_directories_take_turns_and_close_gives_every_descriptor_back(tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    tier = opened(*places)
    for seed in range(4):
        source, extent = random_bytes(seed=seed), staged(tier)
        target = torch.zeros_like(source)
        extent.read_into(target, [extent.write_from(source, [])]).synchronize()
        assert torch.equal(target, source)
    assert [spill.stats()["peak_used_bytes"] for spill in tier._spills] == [16384, 16384]
    del extent
    tier.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_device_without_a_direct_way_is_refused_and_nothing_stays_open(tmp_path: Path) -> None:
    class Second(Link):
        def direct_file(self, descriptor: int) -> DirectFile:
            if self.files:
                raise OSError("not this one")
            return super().direct_file(descriptor)

    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    tier = SsdTier(ActivationsConfig(path=tuple(map(str, places)), gds=True))
    link = Second(lambda nbytes: nbytes)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="not this one"):
        tier.open_direct_way(link)
    assert tier.direct_way is None
    assert len(os.listdir("/proc/self/fd")) == before
    tier.close()


def test_without_kvikio_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install .*kvikio"):
        require_direct(["/tmp"])


def test_what_a_host_holds_is_verified_beside_the_direct_way(spill_dir: Path) -> None:
    tier = opened(spill_dir)
    assert not tier.facts().verify, "of what the device writes itself nothing is"
    source = random_bytes()
    extent = tier.write(source.data_ptr(), source.nbytes)
    assert extent is not None
    tier.drain()
    again = os.open(f"/proc/self/fd/{tier._spills[0].fileno()}", os.O_WRONLY)
    os.pwrite(again, b"\xff" * 512, extent.offset)
    os.close(again)
    with pytest.raises(OSError, match="other bytes than were written"):
        extent.fetch()
    tier.close()


def test_a_forked_child_keeps_no_direct_descriptor(
    spill_dir: Path, in_child: Callable[[Callable[[], bool]], bool]
) -> None:
    tier = opened(spill_dir)
    way = tier.direct_way
    assert way is not None
    descriptor = next(iter(way._files.values()))._descriptor  # type: ignore[attr-defined]

    def is_open() -> bool:
        try:
            os.fstat(descriptor)
        except OSError:
            return False
        return True

    assert is_open()
    assert not in_child(is_open)
    assert is_open()
    tier.close()
