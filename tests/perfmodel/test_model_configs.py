"""Models from a config.json: as many parameters as the published ones have, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perfmodel.model_configs import MODEL_TYPES, model_of_config, read_config


def llama(kind: str, hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int) -> Any:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
    }


# What each model's card or `model.num_parameters()` says.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7B": (llama("llama", 4096, 11008, 32, 32, 32, 32000), 6_738_415_616),
    "Llama-3-8B": (llama("llama", 4096, 14336, 32, 32, 8, 128256), 8_030_261_248),
    "Llama-3-70B": (llama("llama", 8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
    "Mistral-7B": (llama("mistral", 4096, 14336, 32, 32, 8, 32000), 7_241_732_096),
    "Mixtral-8x7B": (
        llama("mixtral", 4096, 14336, 32, 32, 8, 32000)
        | {"num_local_experts": 8, "num_experts_per_tok": 2},
        46_702_792_704,
    ),
    "Qwen2-7B": (llama("qwen2", 3584, 18944, 28, 28, 4, 152064), 7_615_616_512),
    "Qwen2.5-0.5B": (
        llama("qwen2", 896, 4864, 24, 14, 2, 151936) | {"tie_word_embeddings": True},
        494_032_768,
    ),
    "Qwen3-8B": (
        llama("qwen3", 4096, 12288, 36, 32, 8, 151936) | {"head_dim": 128},
        8_190_735_360,
    ),
    "Gemma-2B": (
        llama("gemma", 2048, 16384, 18, 8, 1, 256000) | {"head_dim": 256},
        2_506_172_416,
    ),
    "Gemma-2-2B": (
        llama("gemma2", 2304, 9216, 26, 8, 4, 256000) | {"head_dim": 256},
        2_614_341_888,
    ),
    "GPT-2": (
        {
            "model_type": "gpt2",
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
        },
        124_439_808,
    ),
    "GPT-NeoX-20B": (
        {
            "model_type": "gpt_neox",
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "vocab_size": 50432,
        },
        20_554_567_680,
    ),
    "OPT-125M": (
        {
            "model_type": "opt",
            "hidden_size": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
        },
        125_239_296,
    ),
    "OPT-350M": (
        {
            "model_type": "opt",
            "hidden_size": 1024,
            "ffn_dim": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
        },
        331_196_416,
    ),
    "BERT-base": (
        {
            "model_type": "bert",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 30522,
        },
        109_514_298,
    ),
    "T5-small": (
        {
            "model_type": "t5",
            "d_model": 512,
            "d_ff": 2048,
            "d_kv": 64,
            "num_layers": 6,
            "num_heads": 8,
            "vocab_size": 32128,
        },
        60_506_624,
    ),
    "T5-base": (
        {
            "model_type": "t5",
            "d_model": 768,
            "d_ff": 3072,
            "d_kv": 64,
            "num_layers": 12,
            "num_heads": 12,
            "vocab_size": 32128,
        },
        222_903_552,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_as_many_parameters_as_is_published(name: str) -> None:
    config, num_params = PUBLISHED[name]
    assert model_of_config(config).num_params == num_params


def test_every_known_type_is_held_against_a_published_model() -> None:
    assert {config["model_type"] for config, _ in PUBLISHED.values()} == set(MODEL_TYPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "model_type='lama' is not known.*did you mean 'llama'"),
        ({"model_type": None}, "model_type=None is not known"),
        ({"hidden_size": None}, "hidden_size is missing in config.json"),
        ({"num_hidden_layers": 0}, "num_layers=0 is not a number from 1"),
        ({"num_hidden_layers": "32"}, "num_layers='32' is not a number"),
        ({"num_attention_heads": "x"}, "value of no number"),
        ({"num_attention_heads": 0}, "value of no number"),
        ({"attention_dropout": "x"}, "dropout='x' is not a number"),
        ({"num_key_value_heads": 5}, "num_kv_heads=5 does not divide num_heads=32"),
        ({"hidden_act": "tanh"}, "activation='tanh' is not known; allowed"),
    ],
)
def test_a_wrong_config_is_refused_by_its_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of_config(PUBLISHED["Llama-2-7B"][0] | change)


def test_a_config_is_read_from_its_file_or_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "Llama-2-7B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED["Llama-2-7B"][0]))
    assert read_config(folder) == read_config(folder / "config.json")
    assert read_config(folder).name == "Llama-2-7B"
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_config(folder)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "nowhere")


def test_a_tanh_that_a_config_switches_off_is_not_counted() -> None:
    config, _ = PUBLISHED["Gemma-2-2B"]
    model = model_of_config(config)
    assert (model.score_softcap, model.head_softcap, model.norm_offset) == (True, True, True)
    model = model_of_config(config | {"attn_logit_softcapping": None})
    assert (model.score_softcap, model.head_softcap) == (False, True)


def test_kernels_that_a_config_names_are_told_apart() -> None:
    config, _ = PUBLISHED["GPT-2"]
    assert model_of_config(config).activation == "gelu_new"
    fused = model_of_config(config | {"activation_function": "gelu_pytorch_tanh"})
    assert fused.activation == "gelu_tanh"
    config, _ = PUBLISHED["GPT-NeoX-20B"]
    assert model_of_config(config).rotary_share == 0.25
    assert model_of_config(config | {"rotary_pct": 1.0}).rotary_share == 1.0
