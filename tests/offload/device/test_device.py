"""Where a tensor's bytes are, and how they come back to their device."""

from __future__ import annotations

import pytest
import torch

from offload import device, native
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


def test_the_bytes_of_a_storage_are_seen_in_place() -> None:
    storage = torch.arange(10, dtype=torch.uint8).untyped_storage()
    flat = device.bytes_of(storage, 3, 8)
    assert flat.tolist() == [3, 4, 5, 6, 7]
    assert flat.data_ptr() == storage.data_ptr() + 3


def test_a_view_has_the_given_geometry_and_keeps_the_bytes(buffer: Buffer) -> None:
    view = device.view_over(buffer, torch.uint8, (5, 3), (7, 2), 11)
    expected = torch.arange(256, dtype=torch.uint8)[3:].as_strided((5, 3), (7, 2), 11 + 3)
    assert view.data_ptr() == buffer.address + 11
    del buffer
    assert torch.equal(view, expected)
    assert view.stride() == (7, 2)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16),
    ],
)
def test_a_view_is_the_same_by_every_way_of_making_it(buffer: Buffer, dtype: torch.dtype) -> None:
    step = dtype.itemsize
    for size, stride, first in [((), (), 2), ((3, 2), (2, 1), 0), ((2, 3), (0, 1), 4)]:
        view = device.view_over(buffer, dtype, size, stride, first * step)
        flat = native.tensor_over(buffer, torch.uint8)[: buffer.nbytes // step * step].view(dtype)
        expected = flat.as_strided(size, stride, first)
        assert (view.dtype, view.shape, view.stride()) == (dtype, size, stride)
        assert view.data_ptr() == expected.data_ptr()
        assert view.storage_offset() == first


def test_a_view_beyond_the_bytes_is_refused(buffer: Buffer) -> None:
    for size, stride, first in [
        ((254,), (1,), 0),
        ((1,), (1,), 253),
        ((1,), (1,), 254),
        ((2,), (2**60,), 0),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=r"beyond|out of bounds|too large"):
            device.view_over(buffer, torch.uint8, size, stride, first)


def test_a_view_keeps_the_memory_when_the_buffer_is_gone(spill_dir: object) -> None:
    arena = Arena(1 << 20)
    spill = Spill(str(spill_dir), arena)
    source = torch.arange(1000, dtype=torch.int32)
    extent = spill.write(source.data_ptr(), source.nbytes)
    assert extent is not None
    view = device.view_over(extent.fetch(), torch.int32, (1000,), (1,), 0)
    del extent
    spill.drain()
    assert arena.stats()["used_bytes"] > 0
    assert torch.equal(view, source)
    del view
    assert arena.stats()["used_bytes"] == 0


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
