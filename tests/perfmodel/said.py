"""A command run in this process, and the words of a small plan."""

from __future__ import annotations

import pytest

from perfmodel.cli import main

SMALL = ["--layers", "2", "--hidden", "256", "--heads", "4"]
BATCH = ["--seq-len", "256", "--micro-batch", "2"]
PLAN = ["plan", *SMALL, *BATCH, "--machine", "rtx-4090"]


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """Return what is printed on stdout, or on stderr where the status is none of success."""
    assert main(words) == status
    out = capsys.readouterr()
    return out.err if status else out.out
