"""How far sparse training is from dense, and what is done past the limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from offload.tokens.meter import measure_quality
from offload.tokens.selection import Kept
from offload.tokens.sparse import SparseTokens
from perfmodel.token_plan import SparsityRule
from tests.offload.tokens.sparse_llama import BLOCK, RULE, batch, made

pytest.importorskip("transformers")


def test_the_meter_refuses_what_says_nothing_and_falls_back_from_no_number() -> None:
    model, given = made(), batch()
    tokens = SparseTokens(model, SparsityRule(**RULE, ratio=0.3))
    nothing = {**given, "labels": torch.full_like(given["labels"], -100)}
    with pytest.raises(ValueError, match="to which nothing compares"):
        measure_quality(model, tokens, nothing)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        measure_quality(model, tokens, given)
    model.gradient_checkpointing_disable()
    fresh = tokens._fresh

    def broken(look: Any, own: Any) -> Kept | None:
        model.model.norm.register_forward_hook(lambda _m, _i, out: out * math.nan)
        return fresh(look, own)

    tokens._fresh = broken
    with pytest.warns(RuntimeWarning, match="all tokens take part"):
        assert math.isnan(measure_quality(model, tokens, given).sparse_loss)
    assert tokens.fallen_back


def test_past_its_limit_the_meter_has_all_tokens_take_part() -> None:
    model, given = made(), batch()
    tokens = SparseTokens(model, SparsityRule(**RULE, ratio=0.1, most_loss_gap=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens.dense = True
    for _ in range(10):  # so that what is left out is missed
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens.dense = None
    with pytest.warns(RuntimeWarning, match="all tokens take part from step 10 on"):
        dense = measure_quality(model, tokens, given).dense_loss
    assert float(model(**given).loss) == dense
    assert measure_quality(model, tokens, given).sparse_loss > dense


def test_a_model_that_fits_what_is_left_alone_has_all_tokens_take_part() -> None:
    model, given = made(), batch()
    rule = SparsityRule(**RULE, ratio=0.1, most_loss_gap=0.01)
    tokens = SparseTokens(model, rule)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(RuntimeWarning, match="all tokens take part from step 20 on"):
        quality = measure_quality(model, tokens, given)
    assert quality.loss_gap < -rule.most_loss_gap
    assert float(model(**given).loss) == quality.dense_loss


def test_scores_of_all_tokens_recall_themselves_and_means_some() -> None:
    found = []
    for pool in (1, 8):
        model = made()
        tokens = SparseTokens(model, SparsityRule(block_tokens=BLOCK, pool_tokens=pool, ratio=0.5))
        quality = measure_quality(model, tokens, batch())
        assert quality.recalls[0] is None
        found.append([each for each in quality.recalls if each is not None])
        assert tokens.recalls is None
        assert "recall" in quality.text()
    assert found[0] == [1.0, 1.0]
    assert all(0.2 < each <= 1 for each in found[1])


def test_the_meter_tells_sparse_from_dense_and_leaves_gradients_alone() -> None:
    model, given = made(), batch()
    model.model.layers[0].eval()
    tokens = SparseTokens(model, SparsityRule(**RULE, ratio=0.3))
    model(**given).loss.backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    random_state = torch.random.get_rng_state()
    found = measure_quality(model, tokens, given)
    assert torch.equal(random_state, torch.random.get_rng_state())
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert found.dense_loss != found.sparse_loss
    assert 0.1 < found.gradient_cosine < 0.9999
    assert not tokens.dense
    assert model.training
    assert not model.model.layers[0].training
    tokens.close()
    tokens = SparseTokens(model, SparsityRule(**RULE, thresholds=(-1.0, 0.0, 0.0, -1.0)))
    same = measure_quality(model, tokens, given)
    assert same.loss_gap == 0.0
    assert same.gradient_cosine == pytest.approx(1.0)
