"""Gradients through kept tokens alone are a dense model's in which the others are constants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from offload import Session
from offload.tokens.causal_lm import causal_lm_of, perceptrons_of
from offload.tokens.gradient_only import GradientOnly, GradientOnlyFollowing
from tests.offload.tokens import sparse_llama
from tests.offload.tokens.some_models import (
    KINDS,
    TOKENS,
    attentions,
    batch,
    made,
    require_near,
    some_kept,
    trained,
)

pytest.importorskip("transformers")


def _always() -> bool:
    return True


def _choose(look: Any) -> Any:
    return some_kept(look.layer)


@contextmanager
def constant(model: Any, *, perceptrons: bool = False) -> Iterator[None]:
    """Have what is not kept be a constant to a dense model's attention, and its output too."""
    changed: list[tuple[int, nn.Module]] = list(enumerate(attentions(model)))
    if perceptrons:
        changed += list(enumerate(perceptrons_of(causal_lm_of(model))))
    for layer, module in changed:
        kept = torch.zeros(2, TOKENS, 1, dtype=torch.bool)
        for one, at in zip(kept, some_kept(layer).rows, strict=True):
            one[at] = True
        module.forward = _constant_forward(module.forward, kept)
    try:
        yield
    finally:
        for _, module in changed:
            del module.forward


class _ConstantKeys(TorchFunctionMode):
    """While entered, keys and values of attention are constants but for what is kept."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self._kept = kept

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            query, *others = args
            args = (query, *(torch.where(self._kept, x, x.detach()) for x in others))
        return function(*args, **(kwargs or {}))


def _constant_forward(whole: Any, kept: Tensor) -> Any:
    def without(x: Tensor) -> Tensor:
        return torch.where(kept, x, x.detach())

    def forward(*inputs: Any, **named: Any) -> Any:
        if inputs:
            inputs = (without(inputs[0]), *inputs[1:])
        else:
            named["hidden_states"] = without(named["hidden_states"])
        with _ConstantKeys(kept[:, None]):  # whose maps are not trained by them either
            found = whole(*inputs, **named)
        return without(found) if isinstance(found, Tensor) else (without(found[0]), *found[1:])

    return forward


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_exact_and_gradients_are_the_kept_tokens(kind: str, padded: bool) -> None:
    model, given = made(kind), batch(padded)
    plain, dense = trained(model, given)
    with constant(model):
        _, expected = trained(model, given)
    kinds = ("q_proj", "query_key_value", "qkv", "c_attn")
    name = next(name for name in dense if any(each in name for each in kinds))
    assert (dense[name] - expected[name]).abs().max() > 1e-2 * dense[name].abs().max()
    each = [
        GradientOnly(module, layer, _choose, active=_always)
        for layer, module in enumerate(attentions(model))
    ]
    loss, found = trained(model, given)
    assert torch.equal(loss, plain)
    require_near(found, expected)
    for one in each:
        one.close()


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma3", "gpt2"])
def test_perceptrons_follow(kind: str) -> None:
    model, given = made(kind), batch(False)
    plain, _ = trained(model, given)
    with constant(model, perceptrons=True):
        _, expected = trained(model, given)
    perceptrons = list(perceptrons_of(causal_lm_of(model)))
    for layer, module in enumerate(attentions(model)):
        found = GradientOnly(module, layer, _choose, active=_always)
        GradientOnlyFollowing(perceptrons[layer], found)
    loss, gradients = trained(model, given)
    assert torch.equal(loss, plain)
    require_near(gradients, expected)


def test_rows_of_attention_come_in_chunks_of_which_each_sees_what_is_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("offload.tokens.gradient_only._CHUNK", 5)
    model, given = made("llama"), batch(False)
    with constant(model):
        _, expected = trained(model, given)
    for layer, module in enumerate(attentions(model)):
        GradientOnly(module, layer, _choose, active=_always)
    require_near(trained(model, given)[1], expected)


def test_dropout_is_refused_where_it_would_be_drawn_twice() -> None:
    model = made("gpt2")
    attention = attentions(model)[0]
    attention.resid_dropout.p = 0.1
    with pytest.raises(ValueError, match=r"resid_dropout drops out 0\.1"):
        GradientOnly(attention, 0, _choose, active=_always)
    perceptron = next(iter(perceptrons_of(causal_lm_of(model))))
    perceptron.dropout.p = 0.2
    with pytest.raises(ValueError, match=r"drops out 0\.2"):
        GradientOnlyFollowing(
            perceptron, GradientOnly(attentions(model)[1], 1, _choose, active=_always)
        )
    llama = made("llama")
    attention = attentions(llama)[0]
    attention.attention_dropout = 0.1
    GradientOnly(attention, 0, _choose, active=_always)
    with pytest.raises(ValueError, match="attention has dropout"):
        trained(llama, batch(False))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointing"])
def test_a_plan_has_the_dense_loss_and_gradients_near_dense_ones(again: bool) -> None:
    model, given = sparse_llama.made(), sparse_llama.batch(2)
    dense, gradients = trained(model, given)
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rule = {**sparse_llama.RULE, "ratios": [1.0, 0.5, 0.5, 1.0], "sparse_mlp": True}
    plan = {"version": 1, "tokens": {"mode": "gradient", "sparse": rule}}
    with Session(model, plan) as session:
        with session.forward():
            loss = model(**given).loss
        loss.backward()
        found = {name: each.grad.clone() for name, each in model.named_parameters()}
        model.zero_grad()
        quality = session.measure_quality(given)
    assert float(loss) == pytest.approx(float(dense), rel=1e-6)
    assert quality.sparse_loss == quality.dense_loss
    assert 0.3 < quality.gradient_cosine < 0.9999
    assert quality.kept_shares[0] is None
    assert 0.4 < (quality.kept_shares[1] or 0) < 0.7
    last = "model.layers.3.self_attn.q_proj.weight"
    assert torch.allclose(found[last], gradients[last], rtol=1e-4, atol=1e-7)


def test_what_a_perceptron_saves_is_of_kept_tokens_alone() -> None:
    model = made("llama")
    perceptron = next(iter(perceptrons_of(causal_lm_of(model))))
    weights = {each.data_ptr() for each in perceptron.parameters()}
    saved: list[Tensor] = []

    def bytes_of(kept: bool) -> int:
        saved.clear()
        attention = GradientOnly(attentions(model)[0], 0, _choose, active=_always)
        attention.kept = some_kept(0) if kept else None
        follow = GradientOnlyFollowing(perceptron, attention)
        x = torch.randn(2, TOKENS, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each: saved.append(each) or each, lambda each: each
        ):
            perceptron(x)
        follow.close()
        attention.close()
        return sum(each.nbytes for each in saved if each.data_ptr() not in weights)

    assert bytes_of(True) == pytest.approx(some_kept(0).share * bytes_of(False))
