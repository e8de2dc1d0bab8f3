"""Attention without some tokens is that of a dense model in which nobody sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.tokens.causal_lm import causal_lm_of, layers_of, perceptrons_of
from offload.tokens.elimination import Eliminating, Following
from offload.tokens.interception import attentions_of
from offload.tokens.selection import Kept, kept_of

transformers = pytest.importorskip("transformers")

HIDDEN, VOCAB, TOKENS, BLOCK = 32, 101, 44, 4
BLOCKS = TOKENS // BLOCK
SHAPE = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 3}
LLAMA = {**SHAPE, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 3, "n_head": 4, "n_positions": 64}
OPT = {**SHAPE, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": HIDDEN}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 8}),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": 12}),
    "granite": ("Granite", {**LLAMA, "residual_multiplier": 0.3}),
    "gemma": ("Gemma", {**LLAMA, "head_dim": 8, "pad_token_id": 0}),
    # Whose attention's output goes through a norm before it is added.
    "gemma3": ("Gemma3", {**LLAMA, "head_dim": 8, "pad_token_id": 0, "sliding_window": 12}),
    "phi3": ("Phi3", {**LLAMA, "pad_token_id": 0}),
    "mixtral": ("Mixtral", {**LLAMA, "num_local_experts": 4}),
    "gpt_neox": ("GPTNeoX", {**LLAMA, "hidden_dropout": 0.0}),
    "gpt_neox_serial": (
        "GPTNeoX",
        {**LLAMA, "hidden_dropout": 0.0, "use_parallel_residual": False},
    ),
    "gpt2": ("GPT2", {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "opt": ("OPT", {**OPT, "dropout": 0.0}),
    "opt_350m": ("OPT", {**OPT, "dropout": 0.0, "do_layer_norm_before": False}),
}


def made(kind: str) -> Any:
    """Return a small model in training, without dropout."""
    name, settings = KINDS[kind]
    text = "TextConfig" if name == "Gemma3" else "Config"
    config = getattr(transformers, name + text)(**settings)
    config.attention_dropout = config.attn_pdrop = 0.0
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, name + suffix)(config).train()


def batch(padded: bool) -> dict[str, Tensor]:
    """Return two sequences, one with padding in front where `padded`."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, TOKENS))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, : 2 * BLOCK + 1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def some_kept(layer: int) -> Kept:
    """Return other blocks for each layer and sequence."""
    generator = torch.Generator().manual_seed(layer)
    scores = torch.rand(2, BLOCKS, generator=generator).tolist()
    chosen = [[one > 0.5 for one in each] for each in scores]
    nothing = [[False] * BLOCKS] * 2
    settings = {"tokens": TOKENS, "block_tokens": BLOCK, "device": torch.device("cpu")}
    return kept_of(chosen, scores, always=nothing, never=nothing, **settings)


def attentions(model: Any) -> list[nn.Module]:
    """Return each layer's attention."""
    found = causal_lm_of(model)
    modules = list(attentions_of(found, layers_of(found)))
    assert len(modules) == 3
    return [each for each in modules if each is not None]


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


def trained(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and all gradients of a step."""
    loss = model(**given, use_cache=False).loss
    loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def require_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Hold gradients to what sums in another order may differ by."""
    assert found.keys() == expected.keys()
    largest = max(float(each.abs().max()) for each in expected.values())
    for name, each in expected.items():
        assert (found[name] - each).abs().max() <= 3e-5 * each.abs().max() + 1e-7 * largest, name


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
