"""The start of DeepSpeed's ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.offload.integrations.deepspeed_cases import Ran, Start, started


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`start(ranks, cases)` trains all cases in processes of their own."""

    def run(ranks: int, cases: dict[str, Any]) -> Ran:
        return started(tmp_path_factory.mktemp("deepspeed"), ranks, cases)

    return run
