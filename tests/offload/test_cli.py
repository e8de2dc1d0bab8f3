"""What the command prints besides the doctor's findings."""

from __future__ import annotations

import json

import pytest

from offload.cli import main
from offload.config import markdown, schema


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()


def test_the_page_of_all_keys_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown()
