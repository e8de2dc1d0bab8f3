"""How far sparse training is from dense, and what is done past the limit."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offload.tokens.meter import loss_of_output, measure_quality
from offload.tokens.selection import Kept
from offload.tokens.sparse import SparseTokens
from offload.tokens.without_dropout import without_dropout
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


@pytest.mark.parametrize("gradient_only", [False, True])
def test_gradients_too_far_apart_have_all_tokens_take_part_in_either_mode(
    gradient_only: bool,
) -> None:
    model, given = made(), batch()
    for least in (-1.0, 1.0):
        limits = {"most_loss_gap": 9.0, "least_gradient_cosine": least}
        rule = SparsityRule(**RULE, ratio=0.1, **limits)
        tokens = SparseTokens(model, rule, gradient_only=gradient_only)
        if least < 0:
            quality = measure_quality(model, tokens, given)
            assert not tokens.fallen_back
        else:
            with pytest.warns(RuntimeWarning, match=r"least_gradient_cosine=1\.0$"):
                measure_quality(model, tokens, given)
            assert tokens.fallen_back
        tokens.close()
    assert quality.gradient_cosine < 0.9999
    assert (quality.loss_gap == 0) is gradient_only


def test_a_loss_is_found_in_what_models_return_or_asked_for_by_name() -> None:
    loss = torch.tensor(2.0)
    returned = ({"loss": loss}, (loss, None), [loss], loss, SimpleNamespace(loss=loss))
    assert all(loss_of_output(each) is loss for each in returned)
    for wrong in (torch.zeros(2), None, (), {"logits": loss}):
        with pytest.raises(ValueError, match="loss_of="):
            loss_of_output(wrong)


class Dropping(nn.Module):
    """Drops in as many ways as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.heads = nn.Dropout(0.5), nn.MultiheadAttention(8, 2, dropout=0.5)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            self.module(x),
            self.heads(x, x, x)[0],
            F.dropout(x, 0.5),
            F.dropout(x, p=0.5, training=self.training),
            torch.dropout(x, 0.5, True),
            F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
            F.scaled_dot_product_attention(x, x, x, None, 0.5),
        ]


def test_nothing_is_dropped_while_it_is_measured_and_all_afterwards() -> None:
    torch.manual_seed(0)
    model, x = Dropping(), torch.randn(16, 4, 8)
    with without_dropout(model):
        one, other = model(x), model(x)
    assert [torch.equal(*pair) for pair in zip(one, other, strict=True)] == [True] * 7
    with pytest.raises(TypeError), without_dropout(model):
        model(None)
    one, other = model(x), model(x)
    assert [torch.equal(*pair) for pair in zip(one, other, strict=True)] == [False] * 7
    assert model.module.p == 0.5
    assert model.training


def test_with_dropout_the_verdict_is_not_one_of_random_numbers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 101, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 96}
    config = transformers.GPT2Config(**shape, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    model = transformers.GPT2LMHeadModel(config).train()
    tokens = SparseTokens(model, SparsityRule(**RULE, ratio=0.5, most_loss_gap=1.0))
    found, given = [], batch()
    for seed in range(3):
        torch.manual_seed(seed)
        found.append(measure_quality(model, tokens, given))
    assert found[0] == found[1] == found[2]
    assert found[0].loss_gap != 0
    shares = [each.p for each in model.modules() if isinstance(each, nn.Dropout)]
    assert set(shares) == {0.3}
    assert model(**given).loss != model(**given).loss


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
