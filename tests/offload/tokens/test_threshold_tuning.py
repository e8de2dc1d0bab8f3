"""Thresholds of a model: from its own scores, and lower where its loss minds."""

from __future__ import annotations

import pytest
import torch

from offload.tokens.threshold_tuning import ThresholdTuning
from perfmodel.token_plan import SparsityRule
from tests.offload.tokens.sparse_llama import RULE, batch, made

pytest.importorskip("transformers")


def tuning(**settings: object) -> ThresholdTuning:
    rule = SparsityRule(**RULE, ratios=(1.0, 0.5, 0.5, 1.0))
    given = {"model": made(), "rule": rule, "batches": [batch(2)], **settings}
    return ThresholdTuning(**given)  # type: ignore[arg-type]


def test_the_profile_is_of_layers_that_leave_tokens_out_and_parts_their_blocks() -> None:
    found = tuning()
    first = found.profile()
    assert [each > 0 for each in first] == [False, True, True, False]
    tried = found.tried(first)
    assert 0.5 < tried.kept_share < 1
    everything = found.tried([0.0 if each > 0 else each for each in first])
    assert everything.kept_share > tried.kept_share
    nothing = found.tried([1e9 if each > 0 else each for each in first])
    assert 0.5 < nothing.kept_share < tried.kept_share
    found.close()


def test_what_costs_much_is_left_out_and_what_costs_nothing_stays() -> None:
    found = tuning()
    first = found.profile()
    dear = found.tune(first, cost=1e3)
    assert all(new >= old for new, old in zip(dear, first, strict=True))
    assert found.tried(dear).kept_share < found.tried(first).kept_share
    told: list[float] = []
    found.tune(first, cost=1.0, rounds=2, tell=lambda tried: told.append(tried.loss))
    assert len(told) == 2 * 2 * 2
    found.close()


def test_the_model_is_as_it_was_afterwards() -> None:
    model = made().eval()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    found = tuning(model=model)
    found.tried(found.profile())
    found.close()
    assert not model.training
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())
    assert not any("forward" in vars(each) for each in model.modules())


def test_what_there_is_nothing_to_tune_of_is_refused() -> None:
    with pytest.raises(ValueError, match="no batches"):
        tuning(batches=[])
    with pytest.raises(ValueError, match="thresholds already"):
        tuning(rule=SparsityRule(**RULE, thresholds=(0.1,) * 4))
    with (
        pytest.warns(RuntimeWarning, match="leaves tokens out"),
        pytest.raises(ValueError, match="nothing to tune"),
    ):
        tuning(rule=SparsityRule(**RULE, ratios=(1.0,) * 4))
