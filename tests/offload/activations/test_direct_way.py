"""Activations past host memory, on the emulated device; test_crossing.py has what all ways do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import offload
from offload.device import EmulatedLink
from tests.offload.activations.test_crossing import Open, equal, nothing_left, train


def test_what_goes_past_host_memory_is_neither_staged_nor_pinned_nor_verified(make: Open) -> None:
    link = EmulatedLink()
    act = make(tier="ssd", gds=True, schedule="auto", emulated_device=link)
    assert link.pinned == {}
    assert equal(train(act, 6), train(None, 6))
    stats = act.stats()
    assert (stats.io_engine, stats.verify) == ("gds", False)
    assert stats.staging_peak_bytes == 0
    assert stats.ssd_write_bytes == stats.offloaded_bytes
    assert 0 < stats.ssd_read_bytes <= stats.reloaded_bytes
    assert act.book.planned > 0, "the drive's rates are known though the link is not used"
    nothing_left(act)


def test_a_direct_write_that_fails_is_an_error_and_nothing_hangs(
    make: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "the device says no")

    monkeypatch.setattr("offload.device.emulated.EmulatedFile.write", fail)
    act = make(tier="ssd", gds=True, emulated_device=EmulatedLink())
    with pytest.raises(OSError, match="says no"):
        train(act, 3)
    act.close()


def test_the_direct_way_needs_a_gpu_and_kvikio(
    spill_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="torch sees no GPU"):
        offload.ActivationOffload(path=spill_dir, gds=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="kvikio"):
        offload.ActivationOffload(path=spill_dir, gds=True)
