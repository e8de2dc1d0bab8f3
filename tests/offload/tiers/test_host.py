"""The host tier: room for a device's bytes, up to a bound."""

from __future__ import annotations

import pytest
import torch

from offload.native import tensor_over
from offload.tiers import HostTier

PAGE = 4096


def test_bytes_stay_where_they_were_put() -> None:
    tier = HostTier(16 * PAGE)
    extent = tier.stage(5000, 24)
    assert extent is not None
    assert extent.nbytes == 5000
    assert extent.staged().address % 64 == 24
    source = torch.arange(5000, dtype=torch.int16).view(torch.uint8)[:5000]
    tensor_over(extent.staged(), torch.uint8).copy_(source)
    extent.start_write()
    assert extent.prefetch()
    assert extent.ready
    assert torch.equal(tensor_over(extent.fetch(), torch.uint8), source)


def test_a_full_tier_says_so_and_has_room_again_later() -> None:
    tier = HostTier(4 * PAGE)
    extents = [tier.stage(PAGE, 0) for _ in range(4)]
    assert all(extents)
    assert tier.stage(1, 0) is None
    assert tier.stats()["used_bytes"] == tier.limit_bytes() == 4 * PAGE
    extents.pop()
    assert tier.stage(PAGE, 0) is not None
    assert tier.stats()["peak_used_bytes"] == 4 * PAGE


def test_more_than_there_is_is_refused_by_name() -> None:
    with pytest.raises(MemoryError, match="host_bytes"):
        HostTier(1 << 60)


def test_closing_gives_the_memory_back() -> None:
    tier = HostTier(8 << 20)
    extent = tier.stage(4 << 20, 0)
    assert extent is not None
    tensor_over(extent.staged(), torch.uint8).fill_(1)
    assert tier.stats()["native_bytes"] >= 4 << 20
    del extent
    tier.close()
    assert tier.stats()["native_bytes"] == 0
