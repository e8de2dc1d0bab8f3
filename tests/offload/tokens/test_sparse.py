"""Sparse training of a model: what its rule says is kept, and what must be is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from offload.tokens.meter import measure_quality
from offload.tokens.sparse import SparseTokens, bounds_of
from perfmodel.token_plan import SparsityRule

transformers = pytest.importorskip("transformers")

VOCAB, TOKENS, BLOCK = 101, 96, 8
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
RULE: dict[str, Any] = {"block_tokens": BLOCK, "pool_tokens": 2}


def made(**settings: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **settings)).train()


def batch(rows: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, TOKENS))
    return {"input_ids": ids, "labels": ids.clone()}


def test_later_layers_keep_about_their_share_and_the_others_all() -> None:
    model = made()
    tokens = SparseTokens(model, SparsityRule(**RULE, ratio=0.5))
    assert tokens.sparse_layers == 2
    model(**batch()).loss.backward()
    assert tokens.kept_shares[0] is None
    assert tokens.kept_shares[3] is None
    for share in tokens.kept_shares[1:3]:
        assert share is not None
        assert 0.3 <= share <= 0.75


def test_evaluation_and_dense_steps_are_exact_modes() -> None:
    model, given = made(), batch()
    from offload.tokens import ExactTokens

    exact = ExactTokens(model)
    expected = model(**given).loss
    exact.close()
    tokens = SparseTokens(model, SparsityRule(**RULE))
    sparse = model(**given).loss
    assert not torch.equal(sparse, expected)
    tokens.dense = True
    assert torch.equal(model(**given).loss, expected)
    tokens.dense = False
    model.eval()
    with torch.no_grad():
        logits = model(given["input_ids"]).logits
    tokens.close()
    with torch.no_grad():
        assert torch.equal(model(given["input_ids"]).logits, logits)
    assert "forward" not in vars(model.model.layers[1].self_attn)


def test_a_layer_whose_blocks_are_all_below_its_threshold_keeps_those_that_must_be() -> None:
    model = made()
    never_met = (1e9,) * 4
    tokens = SparseTokens(model, SparsityRule(**RULE, thresholds=never_met))
    chosen = []
    choose = tokens._choose
    for each in tokens._eliminating:
        each._choose = lambda look: chosen.append(choose(look)) or chosen[-1]
    model(**batch()).loss.backward()
    assert [one.blocks for one in chosen] == [((0, TOKENS // BLOCK - 1),)] * 4


def test_thresholds_below_all_scores_keep_everything() -> None:
    model, given = made(), batch()
    tokens = SparseTokens(model, SparsityRule(**RULE, thresholds=(-1.0,) * 4))
    assert tokens.sparse_layers == 0
    model(**given)
    tokens.close()
    tokens = SparseTokens(model, SparsityRule(**RULE, thresholds=(0.0,) * 4))
    model(**given)
    assert tokens.kept_shares == [1.0] * 4


def test_what_comes_later_changes_nothing_of_what_was_kept_before() -> None:
    kept = []
    for tail in (0, 1):
        model = made()
        tokens = SparseTokens(model, SparsityRule(**RULE, ratio=0.5))
        found: list[Any] = []
        choose = tokens._choose
        for each in tokens._eliminating:
            each._choose = lambda look, ask=choose, to=found: to.append(ask(look)) or to[-1]
        given = batch()
        given["input_ids"][:, TOKENS // 2 :] = (given["input_ids"][:, TOKENS // 2 :] + tail) % VOCAB
        model(**given)
        kept.append([{n for n in one.blocks[0] if n < TOKENS // BLOCK // 2} for one in found])
    assert kept[0] == kept[1]
    assert len(kept[0]) == 2


def test_labels_sinks_documents_and_named_tokens_are_always_kept() -> None:
    labels = torch.full((2, 40), -100)
    labels[0, 17] = 5
    ids = torch.zeros(2, 40, dtype=torch.long)
    ids[1, 25] = 7
    positions = torch.arange(40).expand(2, -1).clone()
    positions[0, 30:] -= 30
    mask = torch.ones(2, 40)
    mask[1, 32:] = 0
    rule = SparsityRule(block_tokens=8, pool_tokens=8, keep_token_ids=(7,))
    given = {
        "labels": labels,
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": mask,
    }
    always, never = bounds_of(given, rule, 2, 40)
    assert always.tolist() == [
        [True, False, True, True, True],  # sink, a label, a document's beginning, the last
        [True, False, False, True, False],  # sink, the token 7 and the last one of its own
    ]
    assert never.tolist() == [[False] * 5, [False] * 4 + [True]]


def test_training_by_checkpointing_is_the_same_to_the_bit() -> None:
    found = []
    for again in (None, False, True):
        model = made()
        tokens = SparseTokens(model, SparsityRule(**RULE), mlp_tile_tokens=0)
        if again is not None:
            model.gradient_checkpointing_enable({"use_reentrant": again})
            model.enable_input_require_grads()
        loss = model(**batch(2)).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        tokens.close()
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_perceptrons_and_groups_go_with_checkpointing_and_tiles() -> None:
    found = []
    for again in (False, True):
        model = made()
        rule = SparsityRule(**RULE, sparse_mlp=True, group_tokens=16)
        tokens = SparseTokens(model, rule, mlp_tile_tokens=16)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch(2)).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        tokens.close()
        assert not any("forward" in vars(each) for each in model.modules())
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    plain = SparseTokens(made(), SparsityRule(**RULE)).model.whole(**batch(2)).loss
    assert not torch.equal(plain, found[0][0])


def test_steps_are_counted_by_the_models_optimizer_and_ends_are_dense() -> None:
    model, other = made(), torch.nn.Linear(1, 1)
    tokens = SparseTokens(model, SparsityRule(**RULE, warm_up_steps=1, dense_from_step=2))
    optimizer, another = (torch.optim.SGD(each.parameters()) for each in (model, other))
    seen = []
    for _ in range(3):
        another.step()
        seen.append(tokens.is_dense)
        optimizer.step()
    assert seen == [True, False, True]
    tokens.follow(lambda: 1)
    assert not tokens.is_dense
    tokens.close()
    optimizer.step()
    assert tokens._counted == 3


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


def test_adapters_with_dropout_train_by_the_same_random_numbers_as_without_scores() -> None:
    peft = pytest.importorskip("peft")
    states = []
    for ratios in ((1.0,) * 4, (1.0, 0.99, 0.99, 1.0)):
        model = peft.get_peft_model(
            made(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
        ).train()
        tokens = SparseTokens(model, SparsityRule(**RULE, ratios=ratios))
        torch.manual_seed(3)
        tokens.model.decoder.layers[1].self_attn(
            torch.randn(1, TOKENS, 32),
            position_embeddings=(torch.ones(1, TOKENS, 8), torch.zeros(1, TOKENS, 8)),
            attention_mask=None,
        )
        states.append(tokens.kept_shares[1])
        tokens.close()
    assert states[0] is None
    assert states[1] is not None


def test_a_rule_of_other_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="2 numbers, and the model 4 layers"):
        SparseTokens(made(), SparsityRule(ratios=(0.5, 0.5)))


def test_attention_that_is_not_pytorchs_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        SparseTokens(made(attn_implementation="eager"))


def test_the_meter_tells_sparse_from_dense_and_leaves_gradients_alone() -> None:
    model, given = made(), batch()
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
    tokens.close()
    tokens = SparseTokens(model, SparsityRule(**RULE, ratios=(1.0,) * 4))
    same = measure_quality(model, tokens, given)
    assert same.loss_gap == 0.0
    assert same.gradient_cosine == pytest.approx(1.0)
