"""What a plan may say of tokens, and what is refused by name."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from perfmodel.plan_file import Plan
from perfmodel.token_plan import SparsityRule, TokensSection, published_ratios


def test_the_published_schedule_has_a_dense_first_half_and_last_layer() -> None:
    assert published_ratios(32, 0.4) == (1.0,) * 15 + (0.4,) * 16 + (1.0,)
    assert published_ratios(1, 0.4) == (1.0,)
    assert published_ratios(4, 0.25) == (1.0, 0.25, 0.25, 1.0)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"ratio": 0.0}, "ratio=0 leaves nothing"),
        ({"ratio": True}, "ratio=True is not a number"),
        ({"ratios": [0.5, 1.5]}, "ratios=1.5 is not a number from 0 to 1"),
        ({"ratios": 0.5}, "ratios=0.5 is not a list"),
        ({"block_tokens": 48}, "not a power of two"),
        ({"block_tokens": 8, "pool_tokens": 16}, "does not divide"),
        ({"ratios": [0.5], "thresholds": [0.5]}, "exclude each other"),
        ({"predictor": "file", "thresholds": [0.5]}, "predictor and thresholds exclude each"),
        ({"first_blocks": -1}, "first_blocks=-1"),
        ({"keep_token_ids": [-5]}, "keep_token_ids=-5"),
        ({"most_loss_gap": -0.1}, "most_loss_gap=-0.1"),
        ({"least_gradient_cosine": 1.5}, "least_gradient_cosine=1.5 is not a number from -1 to 1"),
        ({"ration": 0.5}, "did you mean 'ratio'"),
        ({"ratio": 0.5, "ratios": [0.5]}, "ratio and ratios exclude each other, and ratio=0.5"),
        ({"ratio": 0.5, "thresholds": [0.5]}, "ratio and thresholds exclude each other"),
        ({"causal": "false"}, "causal='false' is not allowed; use True or False"),
        ({"causal": 0}, "causal=0 is not allowed"),
        ({"keep_labels": "no"}, "keep_labels='no'"),
        ({"sparse_mlp": "false"}, "sparse_mlp='false'"),
    ],
)
def test_a_wrong_rule_is_refused_by_name(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Plan.from_mapping({"version": 1, "tokens": {"mode": "sparse", "sparse": settings}})


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"mode": "exact", "sparse": {}}, "sparse says nothing with mode='exact'"),
        ({"mode": "sparse", "sparse": 3}, "sparse=3 is not an object"),
        ({"mode": "sparse", "ratio": 0.5}, "ratio is a setting of tokens.sparse"),
        ({"mode": "sparse", "sparse": {"biased_mlp_columns": 0}}, "leaves nothing"),
        (
            {"mode": "sparse", "sparse": {"biased_mlp_columns": 0.2, "sparse_mlp": True}},
            "exclude each other",
        ),
        ({"mode": "gradients"}, "did you mean 'gradient'|gradient"),
        ({"mode": "gradient", "sparse": {"group_tokens": 8}}, "group_tokens=8 says nothing"),
        ({"mode": "off", "mlp_tile_tokens": 5}, "says nothing with mode='off'"),
    ],
)
def test_a_wrong_section_is_refused_by_name(section: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Plan.from_mapping({"version": 1, "tokens": section})


def test_a_rule_goes_through_json_as_it_is() -> None:
    rule = {"ratios": [1.0, 0.5], "keep_token_ids": [1, 2], "warm_up_steps": 3}
    plan = Plan.from_mapping({"version": 1, "tokens": {"mode": "sparse", "sparse": rule}})
    assert plan.tokens.sparse == SparsityRule(
        ratios=(1.0, 0.5), keep_token_ids=(1, 2), warm_up_steps=3
    )
    assert Plan.from_mapping(plan.to_json()) == plan


def test_layers_are_counted_and_dense_ones_known() -> None:
    with pytest.raises(ValueError, match="1 numbers, and the model 3 layers"):
        SparsityRule(ratios=(0.5,)).of_layers(3)
    rule = SparsityRule(ratio=0.3).of_layers(4)
    assert [rule.is_dense(n) for n in range(4)] == [True, False, False, True]
    assert rule.ratios == published_ratios(4, 0.3)
    assert asdict(rule) == asdict(rule.of_layers(4))
    by_score = SparsityRule(thresholds=(-1.0, 0.0)).of_layers(2)
    assert [by_score.is_dense(n) for n in range(2)] == [True, False]


def test_steps_at_both_ends_are_dense_where_asked() -> None:
    rule = SparsityRule(warm_up_steps=2, dense_from_step=4)
    assert [rule.is_dense_step(n) for n in range(6)] == [True, True, False, False, True, True]
    assert not any(SparsityRule().is_dense_step(n) for n in range(9))
    assert TokensSection().sparse is None
