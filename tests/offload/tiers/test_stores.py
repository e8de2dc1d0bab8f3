"""The tiers of one instance together: what each is asked for, and what they add up to."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.config import ActivationsConfig
from offload.tiers import SsdTier, Stores

MIB = 1 << 20


def config(spill_dir: Path, **settings: object) -> ActivationsConfig:
    chosen: dict[str, object] = {
        "path": (str(spill_dir),),
        "staging_bytes": MIB,
        "spill_bytes": 8 * MIB,
    } | settings
    return ActivationsConfig(**chosen)  # type: ignore[arg-type]


def test_the_ssd_alone_by_default(spill_dir: Path) -> None:
    stores = Stores(config(spill_dir))
    assert list(stores.named()) == ["ssd"]
    assert stores.limits() == {"ssd": 8 * MIB}
    assert stores.facts().io_engine in ("uring", "posix")
    assert stores.counters()["host_used_bytes"] == 0
    stores.close()


def test_host_memory_alone_has_no_file(spill_dir: Path) -> None:
    stores = Stores(config(spill_dir, tier="host", path=(), host_bytes=2 * MIB))
    assert stores.limits() == {"host": 2 * MIB}
    assert stores.facts().io_engine == "none"
    assert (stores.stall_s(), stores.kept_bytes(), stores.kept_total_bytes()) == (0, 0, 0)
    assert stores.host is not None
    extent = stores.host.stage(MIB, 0)
    assert extent is not None
    assert stores.counters()["host_used_bytes"] == MIB
    assert "host_bytes" in stores.why_full()
    stores.flush()
    stores.drain()
    stores.close()
    assert list(spill_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("seen", "all_of_them", "part"), [(0, 0, 4), (1, 1, 4), (2, 2, 4), (8, 8, 16), (1, 8, 16)]
)
def test_host_memory_is_a_part_of_what_is_available_where_nobody_says(
    spill_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: int,
    all_of_them: int,
    part: int,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    for number in range(all_of_them):
        (tmp_path / "gpus" / f"0000:{number:02x}:00.0").mkdir(parents=True)
    monkeypatch.setattr("offload.device._DRIVERS_GPUS", str(tmp_path / "gpus"))
    stores = Stores(config(spill_dir, tier="host", path=()))
    assert stores.host is not None
    total = next(
        int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    assert MIB < stores.host.limit_bytes() <= total // part
    assert stores.counters()["native_bytes"] < MIB, "none of it is touched before it is used"


def test_both_add_up(spill_dir: Path) -> None:
    stores = Stores(config(spill_dir, host_bytes=4 * MIB))
    assert stores.limits() == {"host": 4 * MIB, "ssd": 8 * MIB}
    before = stores.counters()["native_bytes"]
    assert stores.host is not None
    extent = stores.host.stage(3 * MIB, 0)
    assert extent is not None
    assert stores.counters()["native_bytes"] >= before + 3 * MIB
    stores.close()


def test_nothing_is_open_where_one_of_them_cannot_be(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[SsdTier] = []
    monkeypatch.setattr("offload.tiers.stores.SsdTier", opened.append)
    with pytest.raises(MemoryError, match="host_bytes"):
        Stores(config(spill_dir, host_bytes=1 << 60))
    assert not opened


def test_every_counter_that_is_asked_for_is_there_without_an_ssd(spill_dir: Path) -> None:
    with_ssd, without = Stores(config(spill_dir)), Stores(config(spill_dir, tier="host", path=()))
    assert set(without.counters()) <= set(with_ssd.counters())
    with_ssd.close()
    without.close()
