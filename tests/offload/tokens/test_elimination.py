"""Attention without some tokens is that of a dense model in which nobody sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.tokens.causal_lm import causal_lm_of, perceptrons_of
from offload.tokens.elimination import Eliminating, Following
from offload.tokens.selection import Kept
from tests.offload.tokens.some_models import (
    HIDDEN,
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


@contextmanager
def masked(model: Any, *, perceptrons: bool = False) -> Iterator[None]:
    """Have a dense model's attention mask what is not kept, and give nothing for it."""
    changed = attentions(model)
    following = list(perceptrons_of(causal_lm_of(model))) if perceptrons else []
    for layer, module in enumerate(list(changed)):
        rows = torch.zeros(2, TOKENS, dtype=torch.bool)
        for one, at in zip(rows, some_kept(layer).rows, strict=True):
            one[at] = True
        module.forward = _masked_forward(module.forward, rows)
        if perceptrons:
            own = following[layer]
            own.forward = _only_rows(own.forward, rows)
            changed.append(own)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _masked_forward(whole: Any, kept: Tensor) -> Any:
    def forward(*inputs: Any, **named: Any) -> Any:
        mask = named.get("attention_mask")
        if mask is None:
            mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]
        seen = mask if mask.dtype == torch.bool else mask >= 0
        alone = torch.eye(TOKENS, dtype=torch.bool)  # who is left out sees itself, for a softmax
        named["attention_mask"] = (seen & kept[:, None, None, :]) | (
            alone & ~kept[:, None, :, None]
        )
        found = whole(*inputs, **named)
        first = found if isinstance(found, Tensor) else found[0]
        first = torch.where(kept[..., None], first, torch.zeros_like(first))
        return first if isinstance(found, Tensor) else (first, *found[1:])

    return forward


def _only_rows(whole: Any, kept: Tensor) -> Any:
    return lambda x: torch.where(kept[..., None], whole(x), torch.zeros_like(x))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_a_masked_dense_model(kind: str, padded: bool) -> None:
    model = made(kind)
    given = batch(padded)
    plain, _ = trained(model, given)
    with masked(model):
        loss, expected = trained(model, given)
    assert abs(float(loss - plain)) > 1e-5, "leaving tokens out changes nothing here"
    each = [
        Eliminating(module, layer, lambda look: some_kept(look.layer))
        for layer, module in enumerate(attentions(model))
    ]
    ours, found = trained(model, given)
    assert float(ours) == pytest.approx(float(loss), rel=1e-6)
    require_near(found, expected)
    for one in each:
        one.close()
    assert torch.equal(trained(model, given)[0], plain)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma3", "gpt2"])
def test_perceptrons_that_follow_run_for_the_kept_tokens_alone(kind: str) -> None:
    model, given = made(kind), batch(False)
    with masked(model, perceptrons=True):
        loss, expected = trained(model, given)
    closing: list[Any] = []
    perceptrons = list(perceptrons_of(causal_lm_of(model)))
    for layer, module in enumerate(attentions(model)):
        found = Eliminating(module, layer, lambda look: some_kept(look.layer))
        closing += [found, Following(perceptrons[layer], found)]
    ours, gradients = trained(model, given)
    assert float(ours) == pytest.approx(float(loss), rel=1e-6)
    require_near(gradients, expected)
    for one in closing:
        one.close()
    assert not any("forward" in vars(each) for each in model.modules())


def test_everything_kept_is_the_model_itself() -> None:
    model, given = made("llama"), batch(False)
    loss, expected = trained(model, given)
    rows = (torch.arange(TOKENS),) * 2
    for layer, one in enumerate(attentions(model)):
        Eliminating(one, layer, lambda _look: Kept(rows, TOKENS, ()))
    ours, found = trained(model, given)
    assert torch.equal(ours, loss)
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_a_cache_and_unknown_tensors_by_token_are_refused() -> None:
    model = made("llama")
    for layer, one in enumerate(attentions(model)):
        Eliminating(one, layer, lambda look: some_kept(look.layer))
    given = batch(False)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**given, use_cache=True)
    with pytest.raises(ValueError, match="nobody knows how to cut it"):
        model(**given, use_cache=False, weights=torch.ones(2, TOKENS))


def test_who_looks_at_a_modules_output_sees_a_whole_tensor() -> None:
    model, seen = made("llama"), []
    for layer, one in enumerate(attentions(model)):
        Eliminating(one, layer, lambda look: some_kept(look.layer))
        one.register_full_backward_hook(lambda _module, _inputs, grads: seen.append(grads[0].shape))
    trained(model, batch(False))
    assert seen == [(2, TOKENS, HIDDEN)] * 3


def test_a_module_with_a_forward_of_its_own_is_refused() -> None:
    module = nn.Linear(2, 2)
    module.forward = module.forward
    with pytest.raises(ValueError, match="another library's"):
        Eliminating(module, 0, lambda _look: None)
