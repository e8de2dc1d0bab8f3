"""Predictors learn what attention looks at, lose what they do not use, and go through a file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.tokens.predictor import BlockPredictor, block_means
from offload.tokens.predictor_file import Provenance, load_predictors, save_predictors
from offload.tokens.predictor_training import PredictorTraining
from offload.tokens.sparse import SparseTokens
from perfmodel.token_plan import SparsityRule

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

VOCAB, BLOCK, TOKENS = 64, 8, 96
SIZES = {"channels": 32, "heads": 4, "block_tokens": BLOCK}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def made() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).train()


def batches(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Return sequences of blocks out of four, so that there is little to be learnt."""
    blocks = torch.randint(VOCAB, (4, BLOCK), generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(4, (count, TOKENS // BLOCK), generator=generator)
    return [{"input_ids": blocks[each].reshape(1, -1)} for each in chosen]


def provenance(**more: Any) -> Provenance:
    given = {
        **SIZES,
        "causal": True,
        "model": "a model",
        "data": "some",
        "steps": 1,
        "seq_len": TOKENS,
        "recalls": {"1": 0.5},
    }
    return Provenance(**(given | more))


def test_a_trained_predictor_finds_more_than_an_untrained_one() -> None:
    model = made()
    rule = SparsityRule(block_tokens=BLOCK, pool_tokens=1, ratio=0.4, causal=False)
    before = [each.clone() for each in model.parameters()]
    training = PredictorTraining(model, rule, lr=5e-3, prune_every=30)
    first = training.recalls(batches(10, seed=1))
    training.train(batches(60))
    last = training.recalls(batches(10, seed=1))
    training.close()
    assert first.keys() == last.keys() == {1}
    assert last[1] > first[1] + 0.3
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any("forward" in vars(each) for each in model.modules())


def test_units_that_are_always_zero_go_and_nothing_changes() -> None:
    torch.manual_seed(0)
    predictor = BlockPredictor(**SIZES, low=16, high=32).train()
    with torch.no_grad():
        for net in (predictor.query, predictor.key):
            net.maps[0].weight[3:9] = 0
            net.maps[1].weight[9:] = -net.maps[1].weight[9:].abs()  # of what is never negative
    hidden = torch.randn(2, TOKENS, 32)
    before = predictor(hidden)
    assert predictor.prune(0.999) == 2 * (6 + 23)
    assert [tuple(each.shape) for each in predictor.weights().values()] == [
        (10, 64),
        (9, 10),
        (16, 9),
    ] * 2
    torch.testing.assert_close(predictor(hidden), before)
    assert predictor.prune(0.999) == 0


def test_eight_units_of_each_layer_stay_those_that_are_zero_least() -> None:
    predictor = BlockPredictor(**SIZES, low=16, high=32).train()
    with torch.no_grad():
        for net in (predictor.query, predictor.key):
            net.maps[0].weight[:9] = 0
    before = predictor.query.maps[0].weight[9:].clone()
    predictor(torch.randn(1, TOKENS, 32))
    predictor.prune(0.0)
    assert [each.shape[0] for each in predictor.weights().values()] == [8, 8, 16] * 2
    assert torch.equal(predictor.query.maps[0].weight[1:], before)


def test_a_layer_of_less_than_eight_units_keeps_them() -> None:
    predictor = BlockPredictor(**SIZES, low=4, high=32).train()
    predictor(torch.randn(1, TOKENS, 32))
    predictor.prune(0.0)
    assert [each.shape[0] for each in predictor.weights().values()] == [4, 8, 4] * 2


def test_a_long_run_keeps_the_widths_of_its_fourth_pruning() -> None:
    rule = SparsityRule(block_tokens=BLOCK, pool_tokens=1)
    training = PredictorTraining(made(), rule, prune_every=2)

    def widths() -> list[int]:
        return [each.shape[0] for each in training.predictors[1].weights().values()]

    training.train(batches(8))
    fourth = widths()
    training.train(batches(34))
    assert widths() == fourth
    assert fourth != [64, 256, 64] * 2
    assert min(fourth) >= 8
    training.close()


def test_means_are_over_the_blocks_that_look() -> None:
    pairs = torch.tensor([[[1.0, 2.0, -1.0], [3.0, 4.0, 5.0], [6.0, -1.0, 8.0]]])
    behind = torch.tensor([[10 / 3, 2.0, 8.0]])
    torch.testing.assert_close(block_means(pairs, causal=False), behind)
    ahead = torch.tensor([[1.0, 3.0, 13 / 3]])
    torch.testing.assert_close(block_means(pairs, causal=True), ahead)


def test_a_file_gives_back_the_same_predictors_and_where_they_come_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    predictor = BlockPredictor(**SIZES).train()
    hidden = torch.randn(1, TOKENS, 32)
    predictor(hidden)
    predictor.prune(0.5)
    file = tmp_path / "predictors.safetensors"
    save_predictors(file, {1: predictor}, provenance())
    found, told = load_predictors(file, **SIZES)
    assert told == provenance()
    assert torch.equal(found[1](hidden), predictor(hidden))


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    import resource
    import signal

    file = tmp_path / "predictors.safetensors"
    save_predictors(file, {1: BlockPredictor(**SIZES)}, provenance())
    before = file.read_bytes()
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a full disk has it
        with pytest.raises(OSError, match="predictors"):
            save_predictors(file, {1: BlockPredictor(**SIZES)}, provenance())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_sparse_training_takes_predictors_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "predictors.safetensors"
    torch.manual_seed(0)
    save_predictors(file, {1: BlockPredictor(**SIZES)}, provenance())
    given: dict[str, Any] = {"block_tokens": BLOCK, "pool_tokens": 4, "predictor": str(file)}
    rule = SparsityRule(**given, ratio=0.5)
    model = made()
    tokens = SparseTokens(model, rule)
    for length in (TOKENS, TOKENS - 3):
        ids = batches(1)[0]["input_ids"][:, :length]
        model(input_ids=ids, labels=ids).loss.backward()
        assert tokens.kept_shares[1] is not None
        assert tokens.kept_shares[1] < 0.9
    tokens.close()
    with pytest.raises(ValueError, match="causal=True, and here it is False"):
        SparseTokens(made(), SparsityRule(**given, causal=False))
    with pytest.raises(ValueError, match="has no predictors of layers \\[0\\]"):
        SparseTokens(made(), SparsityRule(**given, ratios=(0.5, 0.5, 1.0)))


@pytest.mark.parametrize("key", ["channels", "heads", "block_tokens"])
def test_predictors_of_other_shapes_are_refused_by_name(tmp_path: Path, key: str) -> None:
    file = tmp_path / "predictors.safetensors"
    save_predictors(file, {1: BlockPredictor(**SIZES)}, provenance())
    with pytest.raises(ValueError, match=rf"was made with {key}={SIZES[key]}, and here it is"):
        load_predictors(file, **{**SIZES, key: 2 * SIZES[key]})


def test_what_is_no_file_of_predictors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file of predictors"):
        load_predictors(tmp_path / "none", **SIZES)
    other = tmp_path / "other"
    other.write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="holds no predictors"):
        load_predictors(other, **SIZES)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds no predictors"):
        load_predictors(tmp_path / "x.safetensors", **SIZES)


def _written(file: Path, maps: dict[str, torch.Tensor], told: object) -> Path:
    from safetensors.torch import save_file

    save_file(maps, file, metadata={"offload.predictors": json.dumps(told)})
    return file


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"recalls": None, "steps": None}, "lacks recalls, steps: train it anew"),
        ({"version": None}, "has version None"),
        ({"version": 2}, "has version 2; this release reads version 1"),
        ({"depth": 3}, "has depth: train it anew"),
    ],
)
def test_a_file_that_tells_too_little_or_too_much_is_refused_by_key(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    told = {"version": 1, **asdict(provenance()), **change}
    told = {key: value for key, value in told.items() if value is not None}
    with pytest.raises(ValueError, match=why):
        load_predictors(_written(tmp_path / "x", {"1.query.0": torch.ones(2, 2)}, told), **SIZES)


def test_a_file_that_tells_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"its offload\.predictors is 3, and not an"):
        load_predictors(_written(tmp_path / "x", {"a": torch.ones(1)}, 3), **SIZES)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"1.key.2": None}, "layer 1: maps key.0, key.1, query.0, .* are there, and not"),
        ({"1.other": torch.ones(2, 2)}, "layer 1: maps .*other.* are there, and not query.0"),
        ({"one.key.0": torch.ones(2, 2)}, "'one.key.0', which is no map of a layer's"),
        ({"1.key.1": torch.ones(2)}, r"layer 1: key.1 is torch.float32 \[2\], and no map"),
        ({"1.key.1": torch.ones(256, 64).int()}, "layer 1: key.1 is torch.int32"),
        ({"1.key.1": torch.ones(256, 3)}, "layer 1: maps of .* do not take blocks of 64"),
        ({"1.key.2": torch.ones(3, 256)}, "layer 1: queries of 64 channels .* keys of 3"),
    ],
)
def test_maps_that_are_missing_or_do_not_fit_are_refused_by_layer(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    maps = {f"1.{name}": each for name, each in BlockPredictor(**SIZES).weights().items()} | change
    told = {"version": 1, **asdict(provenance())}
    there = {name: each.clone() for name, each in maps.items() if each is not None}
    with pytest.raises(ValueError, match=why):
        load_predictors(_written(tmp_path / "x", there, told), **SIZES)


def test_predictors_of_more_layers_than_the_model_has_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "predictors.safetensors"
    save_predictors(file, {n: BlockPredictor(**SIZES) for n in (1, 3, 7)}, provenance())
    rule = SparsityRule(block_tokens=BLOCK, pool_tokens=4, predictor=str(file))
    model = made()
    with pytest.raises(ValueError, match=r"of layers \[3, 7\], and the model has 3 layers: train"):
        SparseTokens(model, rule)
    assert not any("forward" in vars(each) for each in model.modules())


def test_layers_without_attention_need_no_predictors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds = ["conv", "full_attention", "conv", "conv", "full_attention", "full_attention"]
    shape = {**LLAMA, "num_hidden_layers": 6, "num_key_value_heads": 2}
    config = transformers.Lfm2Config(**shape, layer_types=kinds)
    model = transformers.Lfm2ForCausalLM(config).train()
    training = PredictorTraining(model, SparsityRule(block_tokens=BLOCK, pool_tokens=1))
    training.train(batches(1))
    training.close()
    assert list(training.predictors) == [4]
    file = tmp_path / "predictors.safetensors"
    save_predictors(file, training.predictors, provenance())
    rule = SparsityRule(block_tokens=BLOCK, pool_tokens=4, predictor=str(file))
    tokens = SparseTokens(model, rule)
    ids = batches(1)[0]["input_ids"]
    model(input_ids=ids, labels=ids)
    assert [n for n, share in enumerate(tokens.kept_shares) if share is not None] == [4]
    tokens.close()


def test_a_training_that_is_refused_or_over_leaves_each_module_as_it_was() -> None:
    rule = SparsityRule(block_tokens=BLOCK, pool_tokens=1, ratios=(0.5, 0.5, 1.0))
    model = made()
    model.model.layers[0].eval()
    modes = [each.training for each in model.modules()]
    training = PredictorTraining(model, rule)
    training.train(batches(1))
    training.close()
    assert [each.training for each in model.modules()] == modes
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward  # as another library's hook does
    with pytest.raises(ValueError, match="already has a forward of its own"):
        PredictorTraining(model, rule)
    assert [each for each in model.modules() if "forward" in vars(each)] == [attention]


def test_sequences_that_keep_every_block_are_refused_and_nothing_is_learnt() -> None:
    training = PredictorTraining(made(), SparsityRule(block_tokens=BLOCK, pool_tokens=1))
    before = [each.clone() for each in training.predictors[1].parameters()]
    short = [{"input_ids": each["input_ids"][:, : 2 * BLOCK]} for each in batches(1)]
    for asked in (training.train, training.recalls):
        with pytest.raises(ValueError, match=r"of 16 tokens keeps all .* of 8: give more than 16"):
            asked(short)
    after = training.predictors[1].parameters()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    training.close()


def test_recall_leaves_out_the_blocks_that_always_stay() -> None:
    rule = SparsityRule(block_tokens=BLOCK, pool_tokens=1, ratio=0.2, causal=False)
    training = PredictorTraining(made(), replace(rule, last_blocks=8))
    one = training.predictors[1]
    blocks = TOKENS // BLOCK

    def foretold(hidden: torch.Tensor) -> torch.Tensor:
        pairs = torch.zeros(1, blocks, blocks)
        pairs[:, :, 0] = pairs[:, :, 9] = 9.0  # which always stay
        pairs[:, :, 1] = 8.0
        return pairs

    one.forward = foretold  # type: ignore[method-assign]
    true = foretold(torch.zeros(1))
    true[:, :, 1], true[:, :, 2] = 0.0, 8.0
    training._scorer.pair_scores = lambda *_, **__: true  # type: ignore[method-assign]
    assert training.recalls(batches(1)) == {1: 0.0}
    training.rule = replace(training.rule, first_blocks=3)
    with pytest.raises(ValueError, match="no block is kept but those that always stay"):
        training.recalls(batches(1))
    training.close()


def test_a_rule_that_leaves_nothing_out_has_nothing_to_foretell() -> None:
    with pytest.raises(ValueError, match="nothing to foretell"):
        PredictorTraining(made(), SparsityRule(ratios=(1.0, 1.0, 1.0)))


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_two_documents_have_the_means_that_each_has_alone(causal: bool) -> None:
    torch.manual_seed(0)
    pairs = torch.rand(1, 6, 6)
    seen = torch.zeros(1, 6, 6, dtype=torch.bool)
    seen[:, :2, :2] = seen[:, 2:, 2:] = True
    seen = seen.tril()  # as masks of attention have it
    found = block_means(pairs, causal=causal, may_look=seen)
    alone = [block_means(pairs[:, own, own], causal=causal) for own in (slice(2), slice(2, 6))]
    torch.testing.assert_close(found, torch.cat(alone, 1))
