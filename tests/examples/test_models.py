"""Tests of `examples/models.py`: each learns, sees what it may see, and is the same recomputed."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

VOCAB, SEQ_LEN, BATCH = 61, 12, 3
NAMES = ("gpt", "bert", "t5", "llama")
LAYERS = {"gpt": 2, "bert": 2, "t5": 4, "llama": 2}


@pytest.fixture
def models(train_gpt: ModuleType) -> ModuleType:
    """The module, as the script imports it."""
    module: ModuleType = __import__("models")
    return module


@pytest.fixture
def build(models: ModuleType) -> Callable[..., torch.nn.Module]:
    """Make a tiny model by its name."""

    def of(name: str, run: Any = None, dropout: float = 0.0) -> torch.nn.Module:
        torch.manual_seed(0)
        config = models.ModelConfig(
            vocab_size=VOCAB,
            seq_len=SEQ_LEN,
            num_layers=2,
            hidden_size=32,
            num_heads=4,
            dropout=dropout,
        )
        made: torch.nn.Module = models.MODELS[name](config, run or models.call)
        return made

    return of


def window() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCAB, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("name", NAMES)
def test_a_new_model_knows_nothing_and_then_learns(build: Any, name: str) -> None:
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        torch.manual_seed(2)  # BERT hides the same tokens each time
        loss = model(*window())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.05)
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_part_in_the_loss(build: Any, name: str) -> None:
    model = build(name)
    model(*window()).backward()
    without = [
        parameter_name
        for parameter_name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    # Attention does not change when all keys are moved by the same vector.
    assert [one for one in without if not one.endswith("bias")] == []


@pytest.mark.parametrize("name", ["gpt", "llama", "t5"])
def test_nobody_sees_what_comes_after(build: Any, name: str) -> None:
    model = build(name)
    tokens, successors = window()
    for position in range(SEQ_LEN // 2, SEQ_LEN):
        alone = torch.full_like(successors, -100)  # which cross_entropy leaves out
        alone[:, position] = successors[:, position]
        changed = tokens.clone()
        changed[:, position + 1 :] = (changed[:, position + 1 :] + 7) % VOCAB
        assert torch.allclose(model(tokens, alone), model(changed, alone), atol=1e-6)
        if position:
            changed[:, position - 1] = (changed[:, position - 1] + 7) % VOCAB
            assert not torch.allclose(model(tokens, alone), model(changed, alone), atol=1e-6)


def test_t5_reads_what_its_encoder_was_given(build: Any) -> None:
    model = build("t5")
    tokens, successors = window()
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 7) % VOCAB
    assert not torch.allclose(model(tokens, successors), model(changed, successors), atol=1e-6)


def test_bert_guesses_from_both_sides(build: Any) -> None:
    model = build("bert")
    tokens, successors = window()
    losses = []
    for place in (0, SEQ_LEN - 1):
        torch.manual_seed(3)
        before = model(tokens, successors)
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 7) % VOCAB
        torch.manual_seed(3)
        losses.append((before, model(changed, successors)))
    assert all(one != other for one, other in losses)


def test_positions_turn_keys_and_queries_alike(models: ModuleType) -> None:
    config = models.ModelConfig(seq_len=SEQ_LEN, num_layers=1, hidden_size=32, num_heads=4)
    attention = models.GroupedAttention(config)
    one, other = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    turned = attention.rotate(one.expand(1, 1, SEQ_LEN, 8))
    with_other = attention.rotate(other.expand(1, 1, SEQ_LEN, 8))
    products = (turned[0, 0] @ with_other[0, 0].T).diagonal(offset=3)
    assert torch.allclose(products, products[0].expand_as(products), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_run_and_recomputing_gives_the_same_bits(
    models: ModuleType, build: Any, name: str
) -> None:
    ran = []

    def watched(layer: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ran.append(layer)
        again: torch.Tensor = models.recompute(layer, *inputs)
        return again

    outcomes = []
    for run in (models.call, watched):
        model = build(name, run, dropout=0.2)
        torch.manual_seed(4)
        loss = model(*window())
        loss.backward()
        outcomes.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert len(set(map(id, ran))) == len(ran) == LAYERS[name]
    assert all(map(torch.equal, *outcomes))


def test_dropout_drops_while_training_only(build: Any) -> None:
    model = build("gpt", dropout=0.5)
    one, other = model(*window()), model(*window())
    assert one != other
    model.eval()
    assert model(*window()) == model(*window())


def test_heads_that_do_not_divide_are_refused(models: ModuleType) -> None:
    with pytest.raises(ValueError, match="5 heads do not divide 32"):
        models.ModelConfig(seq_len=8, num_layers=1, hidden_size=32, num_heads=5)
    config = models.ModelConfig(seq_len=8, num_layers=1, hidden_size=12, num_heads=4)
    with pytest.raises(ValueError, match="heads of 3 channels"):
        models.GroupedAttention(config)
