"""Identities of memory cannot be forged by reuse, and version counters outlive their memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from offload.activations.identity import (
    WeakTensorRef,
    drop_memory,
    inside_recomputing_checkpoint,
    operator_number,
    physical_alias,
    release_weak_storage,
    root_of,
    sharing_version,
    storage_alive,
    tensor_on,
    weak_storage,
)

Weakly = Callable[[torch.Tensor], int]


@pytest.fixture
def weakly() -> Iterator[Weakly]:
    """Make weak references to tensors' storages, and release them at the end."""
    taken: list[int] = []

    def take(tensor: torch.Tensor) -> int:
        taken.append(weak_storage(tensor.untyped_storage()))
        return taken[-1]

    yield take
    for weak in taken:
        release_weak_storage(weak)


def test_a_storage_is_found_while_it_lives_and_not_after(weakly: Weakly) -> None:
    tensor = torch.ones(4)
    weak = weakly(tensor)
    alive = storage_alive(weak)
    assert alive is not None
    assert alive.data_ptr() == tensor.data_ptr()
    del alive, tensor
    assert storage_alive(weak) is None


def test_a_weak_reference_is_the_storages_key_and_reserves_it_without_the_memory(
    weakly: Weakly,
) -> None:
    tensor = torch.ones(4)
    weak = weakly(tensor)
    assert weak == tensor.untyped_storage()._cdata
    keys = set()
    del tensor
    for _ in range(100):
        other = torch.ones(4)
        keys.add(other.untyped_storage()._cdata)
        assert storage_alive(weak) is None
    assert weak not in keys


def test_views_share_a_root_and_data_aliases_do_not() -> None:
    base = torch.ones(4, 4)
    assert root_of(base) is base
    assert root_of(base.t()[1:]) is base
    assert root_of(base.data) is not base
    assert root_of(base.data)._cdata != base._cdata


def test_a_root_key_is_not_reused_while_its_weak_reference_lives() -> None:
    tensor = torch.ones(4)
    key, hold = tensor._cdata, WeakTensorRef(tensor)
    del tensor
    gc.collect()
    alive = [torch.ones(4) for _ in range(100)]
    assert key not in {other._cdata for other in alive}
    assert hold.expired()


def test_a_counter_outlives_its_memory(weakly: Weakly) -> None:
    tensor = torch.ones(1000)
    alias = tensor.detach()
    weak = weakly(tensor)
    drop_memory(alias)
    tensor.add_(1)
    assert alias._version == tensor._version == 1
    del tensor
    assert storage_alive(weak) is None
    assert alias._version == 1


@pytest.mark.parametrize(
    "promise", [torch.conj, torch._neg_view, lambda z: torch._neg_view(z.conj())]
)
def test_a_physical_alias_shares_the_counter_and_lets_the_memory_go(
    weakly: Weakly, promise: object
) -> None:
    base = torch.randn(8, dtype=torch.complex64)
    tensor = promise(base)  # type: ignore[operator]
    alias = physical_alias(tensor)
    assert not alias.is_conj()
    assert not alias.is_neg()
    assert alias.data_ptr() == base.data_ptr()
    weak = weakly(base)
    drop_memory(alias)
    base.mul_(2)
    assert alias._version == tensor._version == 1
    del base, tensor
    assert storage_alive(weak) is None


def test_restored_memory_counts_with_the_saved_tensor() -> None:
    saved = torch.ones(4)
    alias = saved.detach()
    drop_memory(alias)
    restored = sharing_version(alias, torch.arange(6, dtype=torch.int16).view(2, 3).t())
    assert restored.dtype == torch.int16
    assert restored.stride() == (1, 3)
    restored[0].add_(1)
    assert saved._version == alias._version == 1
    saved.add_(1)
    assert restored._version == 2
    assert alias.numel() == 0


def test_a_default_device_does_not_change_how_memory_is_dropped() -> None:
    alias = torch.ones(4).detach()
    storage = torch.ones(4).untyped_storage()
    with torch.device("meta"):
        drop_memory(alias)
        restored = tensor_on(storage, torch.float32, (2,), (1,), 4)
    assert alias.device.type == restored.device.type == "cpu"


def test_the_operator_number_grows_with_every_node_and_not_between() -> None:
    x = torch.ones(2, requires_grad=True)
    before = operator_number()
    assert operator_number() == before
    assert (x * 2).requires_grad
    assert operator_number() > before


def test_only_a_recomputing_checkpoint_is_seen_as_one() -> None:
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(inside_recomputing_checkpoint())
        return x * 2

    x = torch.ones(2, requires_grad=True)
    look(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        look(x)
    checkpoint(look, x, use_reentrant=False)
    assert seen == [False, False, True]
