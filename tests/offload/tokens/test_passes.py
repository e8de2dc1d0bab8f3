"""What runs again in a backward keeps what its own forward kept, whoever came between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from offload.tokens.selection import Kept
from offload.tokens.sparse import SparseTokens
from perfmodel.token_plan import SparsityRule
from tests.offload.tokens.sparse_llama import BLOCK, RULE, TOKENS, batch, made

pytest.importorskip("transformers")


def forgetful(tokens: SparseTokens) -> list[int]:
    """Have each choice be another one; return a list that counts them."""
    turns: list[int] = []
    fresh = tokens._fresh

    def other(look: Any, own: Any) -> Kept | None:
        turns.append(look.layer)
        generator = torch.Generator().manual_seed(len(turns))
        scores = torch.rand(len(look.hidden), TOKENS // BLOCK, generator=generator)
        tokens._foretold = lambda _look: scores.tolist()
        return fresh(look, own)

    tokens._fresh = other
    return turns


def two_passes(again: bool | None, *, between: str = "", labels: bool = False) -> list[Tensor]:
    """Return losses and gradients of two forwards, and then both backwards."""
    model = made()
    tokens = SparseTokens(model, SparsityRule(**RULE), mlp_tile_tokens=0)
    turns = forgetful(tokens)
    if again is not None:
        model.gradient_checkpointing_enable({"use_reentrant": again})
        model.enable_input_require_grads()
    losses = []
    for number in range(2):
        given = batch(2)
        if labels:  # the same tokens, of which others have labels
            given["labels"][:, number * 40 : number * 40 + 50] = -100
        losses.append(model(**given).loss)
    if between == "dense":
        tokens.fallen_back = True
        losses.append(model(**batch(2)).loss)
    assert len(turns) == 4
    for loss in losses[::-1] if labels else losses:
        loss.backward()
    assert len(turns) == 4
    found = [each.detach() for each in losses]
    found += [p.grad for p in model.parameters() if p.grad is not None]
    tokens.close()
    return found


@pytest.mark.parametrize("again", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("labels", [False, True], ids=["same", "other labels"])
@pytest.mark.parametrize("between", ["", "dense"])
def test_layers_that_run_again_keep_what_their_own_forward_kept(
    again: bool, between: str, labels: bool
) -> None:
    expected = two_passes(None, between=between, labels=labels)
    found = two_passes(again, between=between, labels=labels)
    assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))


@pytest.mark.parametrize("again", [False, True])
def test_a_backward_behind_close_says_so(again: bool) -> None:
    model = made()
    tokens = SparseTokens(model, SparsityRule(**RULE))
    model.gradient_checkpointing_enable({"use_reentrant": again})
    model.enable_input_require_grads()
    loss = model(**batch()).loss
    tokens.close()
    with pytest.raises(RuntimeError, match=r"call backward\(\) before close"):
        loss.backward()
    model(**batch()).loss.backward()


def test_layers_that_somebody_else_runs_again_are_refused() -> None:
    model = made()
    SparseTokens(model, SparsityRule(**RULE), mlp_tile_tokens=0)
    layer = model.model.layers[1]
    whole = layer.forward
    layer.forward = lambda *given, **named: torch.utils.checkpoint.checkpoint(
        whole, *given, use_reentrant=False, **named
    )
    loss = model(**batch()).loss
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        loss.backward()


def test_what_is_asked_without_gradients_is_dense_and_may_have_a_cache() -> None:
    model, given = made(), batch()
    with torch.no_grad():
        expected = model(given["input_ids"]).logits
        said = model.generate(given["input_ids"], max_new_tokens=3, do_sample=False)
        tokens = SparseTokens(model, SparsityRule(**RULE))
        assert torch.equal(model(given["input_ids"]).logits, expected)
        assert torch.equal(
            model.generate(given["input_ids"], max_new_tokens=3, do_sample=False), said
        )
    model(**given).loss.backward()
    assert tokens.kept_share < 1
    assert not tokens._passes._under_way


def test_a_forward_that_fails_leaves_the_next_one_whole() -> None:
    model, given = made(), batch()
    tokens = SparseTokens(model, SparsityRule(**RULE))
    expected = model(**given).loss
    norm = model.model.norm
    norm.forward = lambda _x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(**given)
    del norm.forward
    assert not tokens._passes._under_way
    assert torch.equal(model(**given).loss, expected)
