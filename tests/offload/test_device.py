"""Where a tensor's bytes are, and how they come back to their device."""

from __future__ import annotations

import pytest
import torch

from offload import device
from offload.native import Arena, Buffer, Spill


@pytest.fixture
def buffer(spill_dir: object) -> Buffer:
    spill = Spill(str(spill_dir), Arena(1 << 20), spill_bytes=1 << 20)
    source = torch.arange(256, dtype=torch.uint8)[3:]
    extent = spill.write(source.data_ptr(), source.nbytes)
    assert extent is not None
    return extent.fetch()


def test_only_real_memory_can_be_offloaded() -> None:
    assert device.can_offload(torch.ones(2))
    assert not device.can_offload(torch.ones(2, device="meta"))


def test_bytes_on_the_host_need_no_copy() -> None:
    assert device.host_copy(torch.ones(2).untyped_storage(), 0, 8) is None


def test_on_a_cpu_the_buffer_itself_is_the_memory(buffer: Buffer) -> None:
    assert device.materialise(buffer, torch.device("cpu"), 3) is buffer


def test_a_view_has_the_given_geometry_and_keeps_the_bytes(buffer: Buffer) -> None:
    view = device.view_over(buffer, torch.uint8, (5, 3), (7, 2), 11)
    expected = torch.arange(256, dtype=torch.uint8)[3:].as_strided((5, 3), (7, 2), 11 + 3)
    assert view.data_ptr() == buffer.address + 11
    del buffer
    assert torch.equal(view, expected)
    assert view.stride() == (7, 2)


def test_a_view_of_wider_elements_leaves_odd_bytes_at_the_end(buffer: Buffer) -> None:
    view = device.view_over(buffer, torch.float64, (31,), (1,), 0)
    assert buffer.nbytes == 253
    assert view.view(torch.uint8).tolist() == list(range(3, 3 + 248))


def test_a_restored_tensor_serves_views_as_a_buffer_does() -> None:
    restored = torch.arange(64, dtype=torch.uint8)[4:]
    view = device.view_over(restored, torch.int16, (3, 2), (4, 1), 2)
    assert torch.equal(view.view(torch.uint8)[0], restored[2:6])
    with pytest.raises(RuntimeError, match="byte 5"):
        device.view_over(restored, torch.int16, (1,), (1,), 1)


def test_the_facts_say_yes_or_why_not() -> None:
    found, why = device.device_facts()
    assert found == torch.cuda.is_available()
    assert why
