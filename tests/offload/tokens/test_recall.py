"""Recall is of blocks that stay for their scores alone, against as good a choice by all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offload.tokens.sparse import SparseTokens
from perfmodel.token_plan import SparsityRule
from tests.offload.tokens.sparse_llama import BLOCK, RULE, TOKENS, batch, made

pytest.importorskip("transformers")

BLOCKS = TOKENS // BLOCK
DENSE_BUT_ONE = (1.0, 0.5, 1.0, 1.0)


def _scores(best: tuple[int, ...], high: float, low: float) -> list[float]:
    """Return scores of which these blocks' are best, the first one most."""
    found = [low] * BLOCKS
    for rank, block in enumerate(best):
        found[block] = high - rank / 100
    return found


def recall(
    means: list[float], true: list[float], padded: int = 0, **rule: Any
) -> tuple[float | None, float | None]:
    """Return the second layer's recall and kept share where blocks' scores are these."""
    model, given = made(), batch()
    if padded:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][:, -padded * BLOCK :] = 0
    tokens: Any = SparseTokens(model, SparsityRule(**RULE, **rule))
    tokens._scores = lambda _look, pool_tokens: [true if pool_tokens == 1 else means]
    tokens.recalls = [None] * 4
    model(**given)
    tokens.close()
    assert tokens.recalls[0] is None
    return tokens.recalls[1], tokens.kept_shares[1]


def test_by_thresholds_as_many_of_the_best_are_looked_for_as_were_chosen() -> None:
    means = _scores((1, 2, 3, 4, 5), high=6.0, low=0.0)
    true = _scores((2, 3, 7, 8, 1), high=60.0, low=20.0)  # all of them over the threshold
    found, share = recall(means, true, thresholds=(-1.0, 5.0, -1.0, -1.0))
    assert found == 3 / 5
    assert share == pytest.approx(7 / BLOCKS)


def test_blocks_that_always_stay_are_not_counted_as_found() -> None:
    means = _scores((0, 11, 1, 2, 3, 4), high=6.0, low=0.0)
    true = _scores((0, 11, 3, 4, 5, 6), high=6.0, low=0.0)
    assert recall(means, true, ratios=DENSE_BUT_ONE, causal=False)[0] == 2 / 4


def test_blocks_of_padding_are_not_missed() -> None:
    means = _scores((0, 9, 1, 2, 3, 4), high=6.0, low=0.0)
    true = _scores((10, 11, 1, 2, 5, 6), high=6.0, low=0.0)
    assert recall(means, true, padded=2, ratios=DENSE_BUT_ONE, causal=False)[0] == 2 / 4


@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_raise_how_many_blocks_are_looked_for(causal: bool) -> None:
    scores = _scores((1, 2, 3, 4, 5, 6, 7, 8), high=6.0, low=0.0)
    found = recall(scores, scores, padded=4, ratios=DENSE_BUT_ONE, causal=causal)[0]
    assert found == 1  # the very scores that were chosen by


def test_where_all_that_is_chosen_stays_anyway_there_is_no_recall() -> None:
    scores = _scores((0,), high=6.0, low=0.0)
    ratios, ends = (1.0, 0.01, 1.0, 1.0), {"first_blocks": 2, "last_blocks": 2}
    assert recall(scores, scores, ratios=ratios, causal=False, **ends)[0] is None
