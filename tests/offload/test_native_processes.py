"""The I/O core and other processes: forked children get nothing of it and wait for nothing, and an
interpreter ends whatever is in flight."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offload import native

BLOCK = 1 << 16
InChild = Callable[[Callable[[], Any]], Any]


class Spilled:
    """A spill with one extent on the drive, one still in staging, and one restored buffer."""

    def __init__(self, directory: Path, engine: str) -> None:
        self.arena = native.Arena(64 * BLOCK)
        self.spill = native.Spill(
            str(directory), self.arena, engine=engine, block_bytes=BLOCK, spill_bytes=64 << 20
        )
        self.data = np.random.default_rng(1).integers(0, 256, 4 * BLOCK, np.uint8)
        self.written = self.write()
        self.written.wait_written()
        self.buffer = self.written.fetch()
        self.staged = self.write()
        self.staged.prefetch()

    def write(self) -> native.Extent:
        extent = self.spill.write(self.data.ctypes.data, self.data.nbytes)
        assert extent is not None
        return extent


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return "nothing was refused"


def test_a_forked_child_is_refused_with_a_reason(
    spill_dir: Path, engine: str, in_child: InChild
) -> None:
    here = Spilled(spill_dir, engine)
    refusals = in_child(
        lambda: [
            refusal(action)
            for action in (
                here.write,
                here.written.fetch,
                here.staged.fetch,
                here.staged.prefetch,
                here.written.wait_written,
                here.spill.drain,
                here.spill.stats,
            )
        ]
    )
    assert refusals == [next(iter(refusals))] * len(refusals)
    assert "forked child" in refusals[0]
    # The parent goes on as if nothing had been.
    for extent in (here.written, here.staged, here.write()):
        assert bytes(extent.fetch()) == here.data.tobytes()


def test_a_forked_child_has_no_descriptor_of_ours(
    spill_dir: Path, engine: str, in_child: InChild
) -> None:
    def ours() -> set[str]:
        links = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                link = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:  # the listing's own descriptor
                continue
            if link.startswith(str(spill_dir)) or "io_uring" in link or "eventfd" in link:
                links.add(link)
        return links

    before = ours()
    here = Spilled(spill_dir, engine)
    assert any(link.startswith(str(spill_dir)) for link in ours())
    assert in_child(ours) <= before
    assert in_child(lambda: in_child(ours)) <= before  # nor a grandchild
    assert bytes(here.written.fetch()) == here.data.tobytes()


def test_a_forked_child_drops_everything_without_waiting(
    spill_dir: Path, engine: str, in_child: InChild
) -> None:
    here = Spilled(spill_dir, engine)
    in_flight = [here.write() for _ in range(8)]

    def drop() -> bool:
        in_flight.clear()
        del here.written, here.staged, here.buffer, here.spill, here.arena
        return True

    assert in_child(drop)
    for extent in in_flight:
        assert bytes(extent.fetch()) == here.data.tobytes()


def test_a_forked_child_may_open_a_spill_of_its_own(
    spill_dir: Path, engine: str, in_child: InChild
) -> None:
    here = Spilled(spill_dir, engine)

    def own() -> bool:
        there = Spilled(spill_dir, engine)
        return bytes(there.written.fetch()) == bytes(there.staged.fetch()) == there.data.tobytes()

    assert in_child(own)
    assert bytes(here.written.fetch()) == here.data.tobytes()


# The module is loaded by its path: importing all of offload would take a second each time.
PREAMBLE = """
import ctypes, importlib.util, os, sys
path, directory, engine = sys.argv[1:]
found = importlib.util.spec_from_file_location("offload._C", path)
native = importlib.util.module_from_spec(found)
found.loader.exec_module(native)
slow = native.FaultPlan(rules=[native.FaultRule(action="delay", count=1 << 30, delay_s=0.05)])
arena = native.Arena(8 << 20)
spill = native.Spill(directory, arena, engine=engine, spill_bytes=64 << 20, fault_plan=slow)
data = ctypes.create_string_buffer(b"x" * (1 << 20))
extents = [spill.write(ctypes.addressof(data), 1 << 20) for _ in range(20)]
buffer = extents[0].fetch()
"""
ENDINGS = {
    "falls off its end": ("", 0),
    "exits": ("sys.exit(7)", 7),
    "raises": ("raise KeyError('x')", 1),
    "closes and goes on": ("spill.close(); print(len(bytes(buffer)))", 0),
    "forks, and the child exits": (
        "child = os.fork()\n"
        "if child == 0: sys.exit(5)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
        5,
    ),
    "forks, and the child raises": (
        "child = os.fork()\n"
        "if child == 0: extents[1].fetch()\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
        1,
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_interpreter_ends_with_transfers_in_flight(
    spill_dir: Path, engine: str, ending: str
) -> None:
    code, status = ENDINGS[ending]
    module = sys.modules["offload._C"].__file__
    assert module is not None
    ended = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, module, str(spill_dir), engine],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == status, ended.stderr
    assert list(spill_dir.iterdir()) == []
