"""A small Llama whose tokens can be left out, for tests of sparse training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


def _transformers() -> Any:
    import transformers

    return transformers


def made(**settings: Any) -> Any:
    torch.manual_seed(0)
    return (
        _transformers().LlamaForCausalLM(_transformers().LlamaConfig(**LLAMA, **settings)).train()
    )


def batch(rows: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, TOKENS))
    return {"input_ids": ids, "labels": ids.clone()}
