"""Models by the `config.json` that Hugging Face's transformers write beside their weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from perfmodel.model import Model
from perfmodel.plan import nearest

__all__ = ["MODEL_TYPES", "model_of_config", "read_config"]

Config = Mapping[str, Any]


class _Keys:
    """A configuration that says which key is missing, and which resembles it."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __call__(self, key: str, otherwise: Any = None) -> Any:
        value = self._config.get(key)
        if value is not None:
            return value
        if otherwise is None:
            raise ValueError(
                f"{key} is missing in config.json of model_type "
                f"{self._config.get('model_type')!r}{nearest(key, list(self._config))}"
            )
        return otherwise

    def is_null(self, key: str) -> bool:
        return key in self._config and self._config[key] is None


def _activation(name: str) -> str:
    known = {
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_new",
        "swish": "silu",
    }
    return known.get(name, name)


def _llama(keys: _Keys, **more: Any) -> Model:
    """Llama's, and what was made after it: only `more` differs."""
    settings: dict[str, Any] = {
        "num_layers": keys("num_hidden_layers"),
        "hidden_size": keys("hidden_size"),
        "num_heads": keys("num_attention_heads"),
        "num_kv_heads": keys("num_key_value_heads", keys("num_attention_heads")),
        "head_size": keys("head_dim", keys("hidden_size") // keys("num_attention_heads")),
        "ffn_size": keys("intermediate_size"),
        "gated": True,
        "activation": _activation(keys("hidden_act", "silu")),
        "norm": "rms",
        "positions": "rotary",
        "max_positions": keys("max_position_embeddings", 1),
        "vocab_size": keys("vocab_size"),
        "tied": bool(keys("tie_word_embeddings", False)),
        "attention_bias": bool(keys("attention_bias", False)),
        "ffn_bias": bool(keys("mlp_bias", False)),
        "attention_dropout": keys("attention_dropout", 0.0),
    }
    return Model(**settings | more)


def _qwen2(keys: _Keys) -> Model:
    return _llama(keys, attention_bias=True, output_bias=False)


def _qwen3(keys: _Keys) -> Model:
    return _llama(keys, head_size=keys("head_dim", 128), head_norms=True)


def _mixtral(keys: _Keys) -> Model:
    return _llama(
        keys,
        num_experts=keys("num_local_experts", 8),
        experts_per_token=keys("num_experts_per_tok", 2),
    )


def _gemma(keys: _Keys) -> Model:
    activation = keys("hidden_activation", keys("hidden_act", "gelu_pytorch_tanh"))
    return _llama(
        keys,
        head_size=keys("head_dim", 256),
        activation=_activation(activation),
        norm_offset=True,
        tied=bool(keys("tie_word_embeddings", True)),
    )


def _gemma2(keys: _Keys) -> Model:
    return _llama(
        keys,
        head_size=keys("head_dim", 256),
        activation=_activation(keys("hidden_activation", "gelu_pytorch_tanh")),
        tied=bool(keys("tie_word_embeddings", True)),
        norm_offset=True,
        norms_per_layer=4,
        score_softcap=not keys.is_null("attn_logit_softcapping"),
        head_softcap=not keys.is_null("final_logit_softcapping"),
    )


def _gpt2(keys: _Keys) -> Model:
    return Model(
        num_layers=keys("n_layer"),
        hidden_size=keys("n_embd"),
        num_heads=keys("n_head"),
        ffn_size=keys("n_inner", 4 * keys("n_embd")),
        activation=_activation(keys("activation_function", "gelu_new")),
        vocab_size=keys("vocab_size"),
        max_positions=keys("n_positions", 1024),
        tied=bool(keys("tie_word_embeddings", True)),
        dropout=keys("resid_pdrop", 0.1),
        attention_dropout=keys("attn_pdrop", 0.1),
    )


def _gpt_neox(keys: _Keys) -> Model:
    return Model(
        num_layers=keys("num_hidden_layers"),
        hidden_size=keys("hidden_size"),
        num_heads=keys("num_attention_heads"),
        ffn_size=keys("intermediate_size"),
        activation=_activation(keys("hidden_act", "gelu")),
        positions="rotary",
        rotary_share=keys("rotary_pct", 0.25),
        fused_heads=True,
        max_positions=keys("max_position_embeddings", 2048),
        parallel_residual=bool(keys("use_parallel_residual", True)),
        attention_bias=bool(keys("attention_bias", True)),
        vocab_size=keys("vocab_size"),
        tied=bool(keys("tie_word_embeddings", False)),
        dropout=keys("hidden_dropout", 0.0),
        attention_dropout=keys("attention_dropout", 0.0),
    )


def _opt(keys: _Keys) -> Model:
    return Model(
        num_layers=keys("num_hidden_layers"),
        hidden_size=keys("hidden_size"),
        num_heads=keys("num_attention_heads"),
        ffn_size=keys("ffn_dim"),
        activation=_activation(keys("activation_function", "relu")),
        fused_heads=False,
        norm_last=not keys("do_layer_norm_before", True),
        # 350M has its norms last, and none behind its last layer.
        final_norm=bool(keys("do_layer_norm_before", True)),
        vocab_size=keys("vocab_size"),
        max_positions=keys("max_position_embeddings", 2048) + 2,  # an offset of its table
        embedding_size=keys("word_embed_proj_dim", keys("hidden_size")),
        tied=bool(keys("tie_word_embeddings", True)),
        dropout=keys("dropout", 0.1),
        attention_dropout=keys("attention_dropout", 0.0),
    )


def _bert(keys: _Keys) -> Model:
    return Model(
        num_layers=keys("num_hidden_layers"),
        hidden_size=keys("hidden_size"),
        num_heads=keys("num_attention_heads"),
        ffn_size=keys("intermediate_size"),
        activation=_activation(keys("hidden_act", "gelu")),
        norm_last=True,
        final_norm=False,
        fused_heads=False,
        causal=False,
        vocab_size=keys("vocab_size"),
        max_positions=keys("max_position_embeddings", 512),
        token_types=keys("type_vocab_size", 2),
        embedding_norm=True,
        tied=bool(keys("tie_word_embeddings", True)),
        head_bias=True,
        head_transform=True,
        dropout=keys("hidden_dropout_prob", 0.1),
        attention_dropout=keys("attention_probs_dropout_prob", 0.1),
    )


def _t5(keys: _Keys) -> Model:
    kind = str(keys("feed_forward_proj", "relu"))
    return Model(
        num_layers=keys("num_decoder_layers", keys("num_layers")),
        encoder_layers=keys("num_layers"),
        hidden_size=keys("d_model"),
        num_heads=keys("num_heads"),
        head_size=keys("d_kv"),
        ffn_size=keys("d_ff"),
        gated=kind.startswith("gated-"),
        activation=_activation({"gated-gelu": "gelu_new"}.get(kind, kind.removeprefix("gated-"))),
        norm="rms",
        positions="relative",
        relative_buckets=keys("relative_attention_num_buckets", 32),
        fused_heads=False,
        attention_bias=False,
        ffn_bias=False,
        vocab_size=keys("vocab_size"),
        tied=bool(keys("tie_word_embeddings", True)),
        dropout=keys("dropout_rate", 0.1),
    )


MODEL_TYPES: dict[str, Callable[[_Keys], Model]] = {
    "bert": _bert,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _mixtral,
    "opt": _opt,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "t5": _t5,
}
"""By `model_type`."""


def model_of_config(config: Config, name: str = "") -> Model:
    """Return the model that a `config.json` describes.

    Raises ValueError for a `model_type` that is not known, a missing key, or a wrong value.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"a model's config.json is an object, not {type(config).__name__}")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        hint = nearest(str(kind), list(MODEL_TYPES))
        raise ValueError(f"model_type={kind!r} is not known; known: {', '.join(MODEL_TYPES)}{hint}")
    try:
        model = MODEL_TYPES[kind](_Keys(config))
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"config.json of model_type {kind!r} has a value of no number: {error}"
        ) from None
    object.__setattr__(model, "name", name or str(config.get("_name_or_path") or kind))
    return model


def read_config(path: Path) -> Model:
    """Return the model of a `config.json`, or of the folder that has one.

    Raises ValueError for what cannot be read as JSON and where `model_of_config` does, OSError.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return model_of_config(config, path.parent.name if path.name == "config.json" else path.stem)
