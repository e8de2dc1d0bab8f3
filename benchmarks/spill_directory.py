"""Where a benchmark's spill lies: an empty directory on a drive, gone when the benchmark ends."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.record import ROOT
from offload import native

__all__ = ["add_path_argument", "spill_directory"]


def add_path_argument(parser: argparse.ArgumentParser) -> None:
    """Add --path, the directory to measure."""
    parser.add_argument(
        "--path", type=Path, metavar="DIR", help="on the drive to use (build/spill)"
    )


@contextmanager
def spill_directory(path: Path | None, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Give an empty directory under `path`; one that is missing or not on a drive ends the program.

    A directory in RAM would be measured as a very fast drive, so it is refused.
    """
    if path is None:
        path = ROOT / "build" / "spill"
        path.mkdir(parents=True, exist_ok=True)
    try:
        facts = native.inspect_directory(str(path))
    except OSError as error:
        parser.error(f"--path {path}: {error.strerror or error}; name a directory on an SSD")
    if facts.backing != "disk":
        parser.error(
            f"--path {path} is on {facts.backing} ({facts.filesystem}); name a directory on an SSD"
        )
    # The peers' files have names: a benchmark that is told to end takes them away first.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=path.resolve()) as directory:
            yield directory
    finally:
        signal.signal(signal.SIGTERM, before)
