"""Tokens left out of a model of one's own, which says where they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload.tokens import PlainTokens, measure_quality
from offload.tokens.selection import Kept
from perfmodel.token_plan import SparsityRule

LAYERS, HIDDEN, HEADS, TOKENS, BLOCK = 3, 16, 2, 60, 4
RULE: dict[str, Any] = {"block_tokens": BLOCK, "pool_tokens": 2, "ratios": (1.0, 0.4, 0.4)}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.places = nn.Parameter(torch.randn(TOKENS, HIDDEN))
        self.hidden_from: Tensor | None = None
        """Of a reference: [batch, tokens], who takes part."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        parts = (*(each + self.places[position_ids] for each in parts[:2]), parts[2])
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in parts)
        if self.hidden_from is None:
            mixed: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
            seen = seen & self.hidden_from[:, None, None, :]
            seen = seen | torch.eye(TOKENS, dtype=torch.bool)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        found: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return found if self.hidden_from is None else found * self.hidden_from[..., None]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attentions = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.perceptrons = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))
        self.tokens: PlainTokens | None = None
        self.again = False

    def forward(self, x: Tensor) -> Tensor:
        for number in range(LAYERS):

            def layer(x: Tensor, number: int = number) -> Tensor:
                at = torch.arange(TOKENS)[None]
                x = x + self.attentions[number](F.layer_norm(x, (HIDDEN,)), position_ids=at)
                return x + self.perceptrons[number](F.layer_norm(x, (HIDDEN,)))

            if self.again:
                run = layer if self.tokens is None else self.tokens.carrying(layer)
                x = checkpoint(run, x, use_reentrant=False)
            else:
                x = layer(x)
        return x.square().mean()


def gradients(model: Model) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    loss = model(torch.randn(2, TOKENS, HIDDEN))
    loss.backward()
    found = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    model.zero_grad()
    return loss.detach(), found


def sparse(model: Model, **settings: Any) -> tuple[PlainTokens, dict[int, Kept]]:
    rule = SparsityRule(**{**RULE, **settings.pop("rule", {})})
    tokens = PlainTokens(model, [*model.attentions], rule, **settings)
    kept: dict[int, Kept] = {}
    fresh = tokens._fresh

    def noting(look: Any, own: Any) -> Any:
        kept[look.layer] = found = fresh(look, own)
        return found

    tokens._fresh = noting  # type: ignore[method-assign]
    return tokens, kept


def test_loss_and_gradients_are_those_of_a_masked_dense_model() -> None:
    model = Model()
    tokens, kept = sparse(model)
    loss, found = gradients(model)
    tokens.close()
    assert sorted(kept) == [1, 2]
    for layer, each in kept.items():
        there = torch.zeros(2, TOKENS, dtype=torch.bool)
        for row, at in zip(there, each.rows, strict=True):
            row[at] = True
        model.attentions[layer].hidden_from = there
    masked, expected = gradients(model)
    assert torch.allclose(loss, masked, rtol=1e-6)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("gradient_only", [False, True])
def test_layers_that_run_again_keep_what_their_forward_kept(gradient_only: bool) -> None:
    model = Model()
    model.tokens, _ = sparse(model, gradient_only=gradient_only)
    loss, expected = gradients(model)
    model.again = True
    again, found = gradients(model)
    assert torch.equal(again, loss)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    model.tokens = None
    with pytest.raises(RuntimeError, match="run again by somebody"):
        gradients(model)


def test_evaluation_and_dense_steps_leave_nothing_out() -> None:
    model = Model()
    dense, _ = gradients(model)
    tokens, kept = sparse(model, rule={"warm_up_steps": 1})
    assert torch.equal(gradients(model)[0], dense)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert not torch.equal(gradients(model)[0], dense)
    assert tokens.kept_share < 0.8
    kept.clear()
    model.eval()
    assert torch.equal(gradients(model)[0], dense)
    assert not kept


def test_perceptrons_follow_where_they_are_given() -> None:
    model = Model()
    given = {"rule": {"sparse_mlp": True}, "perceptrons": [*model.perceptrons]}
    tokens, _ = sparse(model, **given)
    rows: list[int] = []
    model.perceptrons[1].register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[1]))
    gradients(model)
    assert rows == [TOKENS], "whoever looks at a module sees a whole tensor"
    assert tokens.kept_share < 0.8
    tokens.close()
    with pytest.raises(ValueError, match="0 perceptrons for 3 attentions"):
        sparse(Model(), rule={"sparse_mlp": True})


def test_a_perceptron_that_runs_before_its_attention_is_refused() -> None:
    class Parallel(Model):
        def forward(self, x: Tensor) -> Tensor:
            at = torch.arange(TOKENS)[None]
            for attention, perceptron in zip(self.attentions, self.perceptrons, strict=True):
                x = x + perceptron(x) + attention(x, position_ids=at)
            return x.square().mean()

    model = Parallel()
    own = {"rule": {"sparse_mlp": True}, "perceptrons": [*model.perceptrons]}
    tokens, _ = sparse(model, **own)
    for _ in range(2):  # what an earlier forward kept is not taken either
        with pytest.raises(ValueError, match=r"before the attention.*sparse_mlp=False"):
            gradients(model)
    tokens.close()


def test_an_attention_may_be_added_to_in_place() -> None:
    class InPlace(Model):
        def forward(self, x: Tensor) -> Tensor:
            at = torch.arange(TOKENS)[None]
            for attention in self.attentions:
                found = attention(F.layer_norm(x, (HIDDEN,)), position_ids=at)
                found += x
                x = found
            return x.square().mean()

    model = InPlace()
    expected = gradients(model)[0]
    tokens, _ = sparse(model, gradient_only=True)
    assert torch.equal(gradients(model)[0], expected)
    tokens.close()


@pytest.mark.parametrize("gradient_only", [False, True])
def test_one_mask_for_all_queries_is_cut_by_keys_alone(gradient_only: bool) -> None:
    class Padded(Attention):
        def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
            q, k, v = (
                each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1)
            )
            mask = (position_ids < TOKENS - 8).view(1, 1, 1, -1)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            found: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
            return found

    model = Model()
    model.attentions = nn.ModuleList(Padded() for _ in range(LAYERS))
    dense = gradients(model)[0]
    tokens, kept = sparse(model, gradient_only=gradient_only)
    loss, found = gradients(model)
    tokens.close()
    assert kept[1].share < 1
    assert torch.equal(loss, dense) == gradient_only
    assert all(torch.isfinite(each).all() for each in found)


def test_adapters_that_come_later_count_steps_as_well() -> None:
    model = Model()
    tokens, _ = sparse(model)
    model.added = nn.Linear(2, 2)
    model.added.weight.grad = torch.ones(2, 2)
    torch.optim.SGD([torch.zeros(1), model.added.weight], lr=0.1).step()
    assert tokens.step == 1
    torch.optim.SGD([torch.zeros(1)], lr=0.1).step()
    assert tokens.step == 1
    tokens.close()


def test_a_copy_of_a_model_is_one_of_its_own() -> None:
    model = Model()
    tokens, _ = sparse(model)
    loss, _ = gradients(model)
    copied = copy.deepcopy(model)
    tokens.close()
    assert torch.equal(gradients(copied)[0], loss)  # which still leaves the same out
    with torch.no_grad():
        copied.attentions[1].out.weight.zero_()
    assert not torch.equal(gradients(copied)[0], gradients(model)[0])


def test_an_interrupted_forward_leaves_nothing_out_of_an_evaluation() -> None:
    model = Model()
    x = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3))
    whole = model.eval()(x)
    model.train()
    tokens, _ = sparse(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.perceptrons[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    hook.remove()
    model.eval()
    at = torch.arange(TOKENS)[None]
    with torch.no_grad():
        assert torch.equal(model(x), whole)
        alone = model.attentions[1](x, position_ids=at)
    tokens.close()
    assert torch.equal(alone, model.attentions[1](x, position_ids=at))


def test_groups_of_kept_tokens_are_no_matter_of_gradients_alone() -> None:
    with pytest.raises(ValueError, match=r"group_tokens=8.*leave it out"):
        sparse(Model(), rule={"group_tokens": 8}, gradient_only=True)


def test_a_predictor_and_an_attention_with_a_forward_of_its_own_are_refused() -> None:
    with pytest.raises(ValueError, match="models of Hugging Face's"):
        sparse(Model(), rule={"predictor": "file"})
    model = Model()
    model.attentions[2].forward = model.attentions[2].forward
    with pytest.raises(ValueError, match="another library's"):
        sparse(model)
    assert "forward" not in vars(model.attentions[1])


@pytest.mark.parametrize("gradient_only", [False, True])
def test_the_meter_measures_a_model_that_returns_its_loss_or_is_told_where_it_is(
    gradient_only: bool,
) -> None:
    model = Model()
    torch.manual_seed(1)
    given = {"x": torch.randn(2, TOKENS, HIDDEN)}
    dense = model(**given)
    tokens, _ = sparse(model, gradient_only=gradient_only, rule={"most_loss_gap": 9.0})
    found = measure_quality(model, tokens, given)
    assert found.dense_loss == dense.item()
    assert (found.sparse_loss == found.dense_loss) is gradient_only
    assert 0 < found.gradient_cosine < 0.9999
    assert [share is None for share in found.kept_shares] == [True, False, False]
    twice = measure_quality(model, tokens, given, loss_of=lambda loss: loss * 2)
    assert twice.dense_loss == 2 * found.dense_loss


class OfIds(Model):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, HIDDEN)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(self.embedding(tokens))


def test_named_tokens_always_stay_wherever_a_model_takes_them() -> None:
    model = OfIds()
    ids = torch.arange(TOKENS).expand(2, TOKENS)
    named = tuple(range(0, TOKENS, 2 * BLOCK))  # one in every other block
    tokens, kept = sparse(model, rule={"keep_token_ids": named})
    for given, by_name in (((ids,), {}), ((), {"tokens": ids})):
        kept.clear()
        model(*given, **by_name)
        for each in (*kept[1].blocks, *kept[2].blocks):
            assert set(range(0, TOKENS // BLOCK, 2)) <= set(each)
    tokens.close()
    model = Model()
    sparse(model, rule={"keep_token_ids": named})
    with pytest.raises(ValueError, match="is given no whole numbers"):
        gradients(model)


def test_what_nothing_would_come_of_is_said_at_the_start() -> None:
    with pytest.raises(ValueError, match="meter_steps=5 is for a Trainer"):
        sparse(Model(), rule={"meter_steps": 5})
    with pytest.warns(RuntimeWarning, match="no attention of 2 leaves tokens out"):
        PlainTokens(Model(), [*Model().attentions][:2], SparsityRule(ratio=0.1))
