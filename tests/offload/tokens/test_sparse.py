"""Sparse training of a model: what its rule says is kept, and what must be is."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
import torch.utils.checkpoint

from offload.tokens.bounds import bounds_of
from offload.tokens.selection import Kept
from offload.tokens.sparse import SparseTokens
from perfmodel.token_plan import SparsityRule
from tests.offload.tokens.sparse_llama import BLOCK, RULE, TOKENS, VOCAB, batch, made

transformers = pytest.importorskip("transformers")


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
    tokens = SparseTokens(model, SparsityRule(**RULE, thresholds=(1e9,) * 4))
    chosen: list[Kept] = []
    fresh = tokens._fresh
    tokens._fresh = lambda *given: chosen.append(fresh(*given)) or chosen[-1]
    model(**batch()).loss.backward()
    assert [one.blocks for one in chosen] == [((0, TOKENS // BLOCK - 1),)] * 4
    tokens.close()
    chosen.clear()
    rule = SparsityRule(**RULE, thresholds=(1e9,) * 4, first_blocks=0, last_blocks=0)
    tokens = SparseTokens(model, rule)
    model(**batch()).loss.backward()  # of the best one alone
    assert tokens.kept_shares == [BLOCK / TOKENS] * 4


def test_thresholds_below_all_scores_keep_everything() -> None:
    model, given = made(), batch()
    tokens = SparseTokens(model, SparsityRule(**RULE, thresholds=(-1.0,) * 4))
    assert tokens.sparse_layers == 0
    model(**given)
    tokens.close()
    tokens = SparseTokens(model, SparsityRule(**RULE, thresholds=(0.0,) * 4))
    model(**given)
    assert tokens.kept_shares == [1.0] * 4


@pytest.mark.parametrize("rows", [1, 2])
def test_what_comes_later_or_stands_beside_changes_nothing_of_what_was_kept_before(
    rows: int,
) -> None:
    kept = []
    for tail in range(3):
        model = made()
        tokens = SparseTokens(model, SparsityRule(**RULE, ratio=0.5))
        found: list[Kept] = []
        fresh = tokens._fresh
        tokens._fresh = lambda *given, ask=fresh, to=found: to.append(ask(*given)) or to[-1]
        given = batch(rows)
        given["input_ids"][0, TOKENS // 2 :] = (given["input_ids"][0, TOKENS // 2 :] + tail) % VOCAB
        given["input_ids"][1:] = (given["input_ids"][1:] + 7 * tail) % VOCAB
        model(**given)
        assert len(found) == 2
        kept.append([{n for n in one.blocks[0] if n < TOKENS // BLOCK // 2} for one in found])
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_no_part_of_what_a_share_is_of(causal: bool) -> None:
    tokens = SparseTokens(made(), SparsityRule(**RULE, ratio=0.4, causal=causal))
    scores = [float(n * 7 % 12) for n in range(12)]
    alone = tokens._chosen(scores, 1)
    for before, after in ((0, 12), (5, 0), (3, 4)):
        never = [True] * before + [False] * 12 + [True] * after
        padded = [99.0] * before + scores + [99.0] * after
        found = tokens._chosen_of(padded, never, 1)
        assert found == [False] * before + alone + [False] * after
    tokens.close()


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
        [True, False, True, True, True],  # sink, a label (and whose it is), a beginning, the last
        [True, False, False, True, False],  # sink, the token 7 and the last one of its own
    ]
    assert never.tolist() == [[False] * 5, [False] * 4 + [True]]


def test_a_dense_step_says_that_all_was_kept() -> None:
    model, given = made(), batch()
    tokens = SparseTokens(model, SparsityRule(**RULE))
    model(**given)
    assert tokens.kept_share < 1
    tokens.fallen_back = True
    model(**given)
    assert tokens.kept_share == 1


def test_labels_that_are_shifted_already_go_with_it() -> None:
    model, given = made(), batch()
    SparseTokens(model, SparsityRule(**RULE))
    expected = model(**given).loss
    shifted = torch.nn.functional.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    found = model(input_ids=given["input_ids"], shift_labels=shifted).loss
    assert torch.equal(found, expected)


def test_the_token_that_foretells_the_first_label_is_kept() -> None:
    labels = torch.full((1, 96), -100)
    labels[0, 40:48] = 5
    always, _ = bounds_of({"labels": labels}, SparsityRule(**RULE), 1, 96)
    assert always[0].nonzero().flatten().tolist() == [0, 4, 5, 11]


def test_positions_of_one_are_every_sequences() -> None:
    positions = torch.arange(96)[None] % 32
    given = {"position_ids": positions}
    always, _ = bounds_of(given, SparsityRule(**RULE), 2, 96)
    assert [each.nonzero().flatten().tolist() for each in always] == [[0, 4, 8, 11]] * 2


def test_a_model_that_is_let_go_of_goes() -> None:
    model = made()
    tokens = SparseTokens(model, SparsityRule(**RULE))
    gone = weakref.ref(model)
    del model, tokens
    gc.collect()
    assert gone() is None


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
    second = torch.optim.SGD(model.parameters())
    seen = []
    for _ in range(3):
        another.step()
        seen.append(tokens.is_dense)
        optimizer.step()
        second.step()
    assert seen == [True, False, True]
    tokens.follow(lambda: 1)
    assert not tokens.is_dense
    tokens.close()
    optimizer.step()
    assert tokens._counted == 3


@pytest.mark.parametrize("again", [False, True])
def test_choosing_draws_no_random_numbers(again: bool) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.3)
    model = peft.get_peft_model(made(), lora).train()
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    states = []
    # All tokens stay both times: by a rule without layers to choose for, and by choosing.
    for thresholds in ((-1.0,) * 4, (-1.0, 0.0, 0.0, -1.0)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = SparseTokens(model, SparsityRule(**RULE, thresholds=thresholds))
        torch.manual_seed(3)
        loss = model(**batch()).loss
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        states.append([torch.random.get_rng_state(), loss.detach(), *grads])
        model.zero_grad()
        tokens.close()
    assert all(torch.equal(one, two) for one, two in zip(*states, strict=True))


def test_rules_that_would_do_nothing_are_said_or_refused() -> None:
    with pytest.warns(RuntimeWarning, match="no layer of 4 leaves tokens out"):
        SparseTokens(made(), SparsityRule(**RULE, ratios=(1.0,) * 4)).close()
    opt = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4}
    config = transformers.OPTConfig(**opt, num_attention_heads=4, word_embed_proj_dim=32)
    model = transformers.OPTForCausalLM(config).train()
    with pytest.raises(ValueError, match="no perceptron of OPTForCausalLM"):
        SparseTokens(model, SparsityRule(**RULE, sparse_mlp=True))


def test_a_rule_of_other_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="2 numbers, and the model 4 layers"):
        SparseTokens(made(), SparsityRule(ratios=(0.5, 0.5)))


def test_attention_that_is_not_pytorchs_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        SparseTokens(made(attn_implementation="eager"))
