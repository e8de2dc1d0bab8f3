"""What autograd saves of models in plain PyTorch, to the byte, against their tapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from perfmodel.layers import TRANSFORMERS, Shape, tape_of
from perfmodel.model import Model
from tests.perfmodel.written_model import Written, saved_nbytes

BATCH, SEQ_LEN = 2, 24
WEIGHT_BYTES = 4  # how many labels the mean is over, which no tape has
ROTARY: dict[str, Any] = {
    "positions": "rotary",
    "norm": "rms",
    "gated": True,
    "activation": "silu",
    "attention_bias": False,
    "ffn_bias": False,
}
T5: dict[str, Any] = {
    "positions": "relative",
    "relative_buckets": 8,
    "encoder_layers": 2,
    "norm": "rms",
    "activation": "relu",
    "attention_bias": False,
    "ffn_bias": False,
    "fused_heads": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "llama": ROTARY,
    "grouped heads": ROTARY | {"num_kv_heads": 2},
    "norms of heads": ROTARY | {"num_kv_heads": 2, "head_norms": True, "head_size": 12},
    "experts": ROTARY | {"num_experts": 4, "experts_per_token": 2},
    "experts without a gate": {"num_experts": 3, "fused_heads": False},
    "gemma": ROTARY | {"norm_offset": True, "tied": True, "activation": "gelu_tanh"},
    "gemma 2": ROTARY
    | {"norm_offset": True, "norms_per_layer": 4, "score_softcap": True, "head_softcap": True},
    "grouped softcap": ROTARY | {"score_softcap": True, "num_kv_heads": 2},
    "gelu by its formula": {"activation": "gelu_new", "tied": True},
    "parallel residual": {
        "positions": "rotary",
        "parallel_residual": True,
        "fused_heads": True,
        "rotary_share": 0.5,
    },
    "separate heads": {"fused_heads": False, "activation": "relu"},
    "another table": {
        "embedding_size": 24,
        "norm_last": True,
        "final_norm": False,
        "fused_heads": False,
        "tied": True,
    },
    "bert": {
        "norm_last": True,
        "final_norm": False,
        "fused_heads": False,
        "causal": False,
        "token_types": 2,
        "embedding_norm": True,
        "head_transform": True,
        "head_bias": True,
        "tied": True,
    },
    "dropout": {"dropout": 0.1},
    "dropout, not of scores": {"dropout": 0.1, "attention_dropout": 0.0},
    "dropout of scores": ROTARY | {"attention_dropout": 0.1, "num_kv_heads": 2},
    "t5": T5,
    "t5 with dropout": T5 | {"dropout": 0.1},
    "gated t5": T5 | {"gated": True, "activation": "gelu_new"},
}


def model_of(kind: str) -> Model:
    return Model(num_layers=2, hidden_size=32, num_heads=4, vocab_size=40, **KINDS[kind])


def saved_of(model: Model, rank: int = 0) -> int:
    """Return what autograd saves of a step with the model."""
    torch.manual_seed(0)
    written = Written(model, SEQ_LEN, rank)
    tokens, targets, labels = (torch.randint(40, (BATCH, SEQ_LEN)) for _ in range(3))
    given = [*written.parameters(), tokens, targets, labels]
    return saved_nbytes(lambda: written(tokens, targets, labels), given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tape_saves_what_autograd_does_to_the_byte(kind: str) -> None:
    model = model_of(kind)
    shape = Shape(batch=BATCH, seq_len=SEQ_LEN, kernels=TRANSFORMERS)
    assert tape_of(model, shape).saved_bytes() + WEIGHT_BYTES == saved_of(model)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not model_of(kind).num_experts])
def test_a_tape_with_adapters_saves_what_autograd_does_to_the_byte(kind: str, rank: int) -> None:
    model = model_of(kind)
    shape = Shape(batch=BATCH, seq_len=SEQ_LEN, kernels=TRANSFORMERS)
    assert tape_of(model, shape, lora_rank=rank).saved_bytes() + WEIGHT_BYTES == saved_of(
        model, rank
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tape_has_the_gradients_of_all_parameters_and_no_others(kind: str) -> None:
    model = model_of(kind)
    tape = tape_of(model, Shape(batch=BATCH, seq_len=SEQ_LEN, kernels=TRANSFORMERS))
    shared = {operator.shared_params: operator for operator in tape.operators}
    own = [each for each in tape.operators if not each.shared_params]
    del shared[""]
    nbytes = sum(operator.param_bytes for operator in [*own, *shared.values()])
    positions = 0 if model.positions != "learned" or model.max_positions else SEQ_LEN
    assert nbytes == 4 * (model.num_params + positions * model.hidden_size)


def test_only_adapters_are_trained_of_a_tape_with_them() -> None:
    model, rank = model_of("llama"), 3
    shape = Shape(batch=BATCH, seq_len=SEQ_LEN)
    whole, tape = tape_of(model, shape), tape_of(model, shape, lora_rank=rank)
    hidden, inner = model.hidden_size, model.ffn_size
    adapters = 4 * 2 * rank * hidden + 3 * rank * (hidden + inner)
    assert sum(each.param_bytes for each in tape.operators) == 4 * 2 * adapters
    # Maps make one gradient, the first layer's of what is not trained none, and scores both.
    gradients = [
        sum(each.matmul_flops * each.matmul_gradients for each in some.operators)
        for some in (whole, tape)
    ]
    assert 0.5 * gradients[0] < gradients[1] < 0.8 * gradients[0]
    assert tape.saved_bytes() < whole.saved_bytes()
    assert tape_of(replace(model, num_layers=1), shape, lora_rank=1).operators
