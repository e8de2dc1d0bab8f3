"""Tests of `offload.optimizer.layout`: every element is in one subgroup, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.optimizer.layout import flat_view, lay_out


@given(
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=20),
    st.integers(1, 60),
)
def test_each_element_is_in_one_subgroup_in_order(
    sizes: list[tuple[int, bool]], subgroup_params: int
) -> None:
    params = [
        torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16 if low else torch.float32))
        for size, low in sizes
    ]
    seen = {param: torch.zeros(param.numel(), dtype=torch.int) for param in params}
    subgroups = lay_out(3, params, subgroup_params)
    for subgroup in subgroups:
        assert subgroup.group == 3
        assert 0 < subgroup.count <= subgroup_params
        assert subgroup.nbytes == 4 * subgroup.num_rows * subgroup.count
        row = torch.zeros(subgroup.count, dtype=torch.int)
        for piece in subgroup.pieces:
            assert (piece.param.dtype == torch.bfloat16) is subgroup.has_master
            piece.of(seen[piece.param]).add_(1)
            piece.inside(row).add_(1)
        assert (row == 1).all()
    assert all((count == 1).all() for count in seen.values())
    for has_master in (False, True):
        counts = [each.count for each in subgroups if each.has_master is has_master]
        assert all(count == subgroup_params for count in counts[:-1])


def test_a_flat_view_is_in_the_order_of_memory_and_shares_it() -> None:
    dense = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    flat = flat_view(dense)
    assert torch.equal(flat, torch.arange(24.0))
    flat[5] = -1
    assert (dense == -1).sum() == 1
    offset = torch.arange(10.0)[4:]
    assert torch.equal(flat_view(offset), offset)
    assert flat_view(torch.tensor(3.0)).shape == (1,)
    for gaps in (torch.zeros(4, 4)[:, :2], torch.zeros(3).expand(2, 3), torch.zeros(8)[::2]):
        with pytest.raises(ValueError, match="gaps or overlaps"):
            flat_view(gaps)
