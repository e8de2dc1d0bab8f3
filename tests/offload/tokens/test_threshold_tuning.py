"""Thresholds of a model: from its own scores, and lower where its loss minds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from offload.tokens.threshold_tuning import ThresholdTuning
from perfmodel.token_plan import SparsityRule
from tests.offload.tokens.sparse_llama import LLAMA, RULE, TOKENS, VOCAB, batch, made

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


def _dropping(**settings: Any) -> Any:
    """Return a GPT-2, which drops a tenth of nearly everything out in training."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=TOKENS, **settings
    )
    return transformers.GPT2LMHeadModel(config).train()


def test_dropout_makes_no_noise_and_draws_nothing() -> None:
    found = tuning(model=_dropping())
    assert found.dense_loss == pytest.approx(
        tuning(model=_dropping(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).dense_loss
    )
    first = found.profile()
    state = torch.get_rng_state()
    losses = {found.tried(first).loss for _ in range(3)}
    assert len(losses) == 1
    assert found.tried([1e9 if each > 0 else each for each in first]).loss not in losses
    assert torch.equal(torch.get_rng_state(), state)
    found.close()


def test_layers_that_run_again_do_so_and_each_forward_draws_the_same() -> None:
    model = _dropping()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    modes: list[tuple[bool, bool]] = []

    def note(layer: Any, _inputs: Any) -> None:
        modes.append((layer.training, layer.attn.training))

    model.transformer.h[1].register_forward_pre_hook(note)
    found = tuning(model=model)
    modes.clear()  # of the forward that looks for attention
    first = found.profile()
    assert len({found.tried(first).loss for _ in range(3)}) == 1
    assert set(modes) == {(True, False)}
    found.close()


def test_each_module_is_in_its_own_mode_afterwards() -> None:
    model = made()
    model.model.layers[0].eval()
    modes = [each.training for each in model.modules()]
    found = tuning(model=model)
    found.tried(found.profile())
    assert [each.training for each in model.modules()] == modes
    found.close()
    assert [each.training for each in model.modules()] == modes


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (None, "a batch of input_ids gives no loss: give each batch labels"),
        (-100, "the loss of batch 1 with all tokens is nan, .* not all ignored"),
    ],
)
def test_a_batch_without_a_loss_is_refused_and_the_model_is_as_it_was(
    labels: int | None, why: str
) -> None:
    model, other = made().eval(), batch()
    if labels is None:
        del other["labels"]
    else:
        other["labels"].fill_(labels)
    with pytest.raises(ValueError, match=why):
        tuning(model=model, batches=[batch(), other])
    assert not any("forward" in vars(each) for each in model.modules())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model.training


def test_a_dense_loss_of_nothing_is_refused() -> None:
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "vocab_size": 1}))
    ids = torch.zeros(1, TOKENS, dtype=torch.long)  # foretold for sure
    with pytest.raises(ValueError, match=r"with all tokens is 0\.0, and parts of it say nothing"):
        tuning(model=model, batches=[{"input_ids": ids, "labels": ids}])


@pytest.mark.parametrize("cost", [0.0, -0.1, math.nan])
def test_a_cost_that_is_none_is_refused(cost: float) -> None:
    found = tuning()
    with pytest.raises(ValueError, match=rf"cost={cost} is not a number over 0"):
        found.tune(found.profile(), cost=cost)
    found.close()


def test_what_there_is_nothing_to_tune_of_is_refused() -> None:
    with pytest.raises(ValueError, match="no batches"):
        tuning(batches=[])
    with pytest.raises(ValueError, match="thresholds already"):
        tuning(rule=SparsityRule(**RULE, thresholds=(0.1,) * 4))
    with pytest.raises(ValueError, match="predictor='file' foretells scores of another scale"):
        tuning(rule=SparsityRule(**RULE, predictor="file"))
    with (
        pytest.warns(RuntimeWarning, match="leaves tokens out"),
        pytest.raises(ValueError, match="nothing to tune"),
    ):
        tuning(rule=SparsityRule(**RULE, ratios=(1.0,) * 4))
