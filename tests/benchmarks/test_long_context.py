"""The benchmarks of long contexts and of ranks of Megatron: what their claims are made of."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

from benchmarks import long_context, megatron_ranks
from benchmarks.long_context import Measured


def test_memory_time_and_losses_are_each_a_claim() -> None:
    def measured(step_s: float, loss: float, peak_bytes: float) -> Measured:
        return Measured([step_s] * 6, [loss] * 6, peak_bytes)

    ways = {
        "plain": measured(1.0, 5.0, 700.0),
        "checkpointing": measured(1.4, 5.0, 140.0),
        "exact": measured(1.2, 5.1, 100.0),
    }
    record = long_context.make_record({2048: ways}, {})
    met = {claim.name: claim.met for claim in record.claims}
    assert met["2048: memory, plain / exact"]
    assert not met["2048: memory, checkpointing / exact"]
    assert met["2048: time, exact / plain"]
    assert met["2048: losses of checkpointing, apart from plain's"]
    assert not met["2048: losses of exact, apart from plain's"]
    assert record.value == 7.0


def test_a_loss_of_several_ranks_that_differs_is_a_claim_that_is_missed() -> None:
    def summary(peak_bytes: int, loss: float) -> dict[str, object]:
        return {
            "peak_activation_bytes": peak_bytes,
            "losses": [loss],
            "step_s": 1.0,
            "offloaded_bytes": 0,
        }

    modes = {"none": summary(100, 1.0), "recompute": summary(30, 1.0), "ssd": summary(40, 1.5)}
    met = {claim.name: claim.met for claim in megatron_ranks.make_record({"two": modes}, {}).claims}
    assert met == {"two: memory, ours / none": True, "two: losses that differ": False}
