"""Tests of `offload.optimizer.placement`: shares are met, and what does not fit is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from offload.config import OptimizerConfig
from offload.optimizer.layout import lay_out
from offload.optimizer.placement import Placement
from offload.optimizer.states import HostStates, SsdStates
from perfmodel.schedules.subgroup_size import PAD_BYTES

SUBGROUPS = lay_out(0, [torch.nn.Parameter(torch.zeros(10_000))], 100)


def placement(path: Path, **settings: object) -> Placement:
    chosen: dict[str, object] = {"path": (str(path),), "staging_bytes": 1 << 20} | settings
    return Placement(OptimizerConfig(**chosen))  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.59, 1.0])
def test_a_share_of_the_states_is_on_the_ssd(spill_dir: Path, share: float) -> None:
    of = placement(spill_dir, placement=f"ssd={share},host={1 - share}")
    states = of.states_of(SUBGROUPS)
    assert sum(isinstance(each, SsdStates) for each in states) == round(100 * share)
    assert sum(isinstance(each, HostStates) for each in states) == 100 - round(100 * share)
    of.close()


def test_without_a_directory_all_are_in_memory(spill_dir: Path) -> None:
    assert OptimizerConfig().shares == {"host": 1.0}
    assert OptimizerConfig(path=(str(spill_dir),)).shares == {"ssd": 1.0}
    assert OptimizerConfig(placement="cpu=0.5,nvme=0.5", path=(str(spill_dir),)).shares == {
        "host": 0.5,
        "ssd": 0.5,
    }
    of = Placement(OptimizerConfig())
    assert all(isinstance(each, HostStates) for each in of.states_of(SUBGROUPS))
    of.close()


def test_as_many_are_on_their_way_as_staging_has_room_for(spill_dir: Path) -> None:
    depths = []
    for staging_bytes in (1 << 15, 1 << 17, 1 << 20):
        of = placement(spill_dir, staging_bytes=staging_bytes)
        of.states_of(SUBGROUPS)
        depths.append(of.ahead)
        of.close()
    assert depths[0] == 1 < depths[1] < depths[2]


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        placement(tmp_path / "missing")


def test_the_next_step_begins_with_what_is_still_staged(spill_dir: Path) -> None:
    of = placement(spill_dir, staging_bytes=10 * (1200 + PAD_BYTES))
    states = of.states_of(SUBGROUPS)
    reads: list[int] = []
    for _ in range(4):
        for number in of.order(states):
            states[number].begin()
            states[number].commit()
            of.updated(states[number])
        of.turn()
        of.settle()
        reads.append(int(of.counters()["read_bytes"]))
    # Six of a hundred are still there: ten less three that come and the one in work.
    pages = 4096  # of a subgroup's 800 bytes
    assert [after - before for before, after in itertools.pairwise([0, *reads])] == [
        0,
        *([94 * pages] * 3),
    ]
    of.close()
