"""Memory's rates: of the medians of all rounds, so that one slow moment is not planned for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from offload.calibrate.memory import PARAMS, MemoryRounds
from offload.calibrate.timing import Stopwatch
from offload.native import ThreadPool


class _Said(Stopwatch):
    """Takes as long as it is told, whatever is done."""

    seconds_said = 1.0

    def seconds(self, *works: Callable[[], object]) -> list[float]:
        for work in works:
            work()
        return [type(self).seconds_said]


def test_a_slow_round_of_three_changes_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.calibrate.memory.Stopwatch", _Said)
    memory = MemoryRounds(_Said(torch.device("cpu")), ThreadPool(1))
    for said in (2.0, 50.0, 2.0):
        monkeypatch.setattr(_Said, "seconds_said", said)
        memory.measure(torch_updates=True)
    assert memory.torch_params_per_s == memory.host_params_per_s == PARAMS / 2
    assert memory.host_bytes_per_s == 4 * PARAMS
    curve = memory.moved_bytes_per_s
    assert len(curve.sizes) == 3
    assert curve.rates == tuple(nbytes / 2 for nbytes in curve.sizes)


def test_torchs_updates_are_not_measured_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.calibrate.memory.Stopwatch", _Said)
    memory = MemoryRounds(_Said(torch.device("cpu")), ThreadPool(1))
    memory.measure(torch_updates=False)
    with pytest.raises(KeyError):
        _ = memory.torch_params_per_s
