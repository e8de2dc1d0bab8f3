"""Small models of many kinds, what is kept of each layer's tokens in them, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offload.tokens.causal_lm import causal_lm_of, layers_of
from offload.tokens.interception import attentions_of
from offload.tokens.selection import Kept, kept_of

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
    import transformers

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
