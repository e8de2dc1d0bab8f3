"""Causal models of Hugging Face's with the loss in segments: their own loss and gradients."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import Session
from offload.tokens import ExactTokens, Tiled

transformers = pytest.importorskip("transformers")

HIDDEN, VOCAB, LENGTH = 32, 211, 40
SHAPE = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2}
LLAMA = {**SHAPE, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64}
PHI = {**LLAMA, "pad_token_id": 0}
GEMMA = {**LLAMA, "head_dim": 8, "pad_token_id": 0}
KINDS: dict[str, tuple[str, Mapping[str, Any], int]] = {
    # With how many perceptrons run in tiles: OPT's maps stand in its layer itself.
    "llama": ("Llama", LLAMA, 2),
    "qwen2": ("Qwen2", LLAMA, 2),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 8}, 2),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": 16}, 2),
    "gemma2": ("Gemma2", {**GEMMA, "final_logit_softcapping": 3.0}, 2),
    "granite": ("Granite", {**LLAMA, "logits_scaling": 8.0}, 2),
    "cohere": ("Cohere", {**LLAMA, "logit_scale": 0.25, "pad_token_id": 0}, 2),
    "phi3": ("Phi3", PHI, 2),
    "gpt2": ("GPT2LMHead", {**GPT2, "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0}, 2),
    "gpt_neox": ("GPTNeoX", {**LLAMA, "hidden_dropout": 0, "attention_dropout": 0}, 2),
    "opt": (
        "OPT",
        {**SHAPE, "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": HIDDEN},
        0,
    ),
    "mixtral": ("Mixtral", {**LLAMA, "num_local_experts": 4, "output_router_logits": True}, 0),
}


def made(kind: str) -> Any:
    """Return a small model in training, with its first weights; without dropout."""
    name, settings, _ = KINDS[kind]
    config = getattr(transformers, f"{name.removesuffix('LMHead')}Config")(**settings)
    config.attention_dropout = config.dropout = 0.0
    torch.manual_seed(0)
    model = getattr(transformers, name + ("Model" if name.endswith("LMHead") else "ForCausalLM"))
    return model(config).train()


def batch(rows: int = 2, *, ignored: int = 9) -> dict[str, Tensor]:
    """Return inputs of which a first part has no label."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, LENGTH))
    labels = ids.clone()
    labels[:, :ignored] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def trained(model: nn.Module, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and all gradients of a step, which are taken away again."""
    loss = model(**batch(), **more).loss
    loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def require_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Hold gradients to what sums in another order may differ by."""
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert (found[name] - each).abs().max() <= 2e-5 * each.abs().max() + 1e-9, name


@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": 17}], ids=["mean", "items"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_untouched_models(kind: str, more: dict[str, Any]) -> None:
    model = made(kind)
    loss, expected = trained(model, **more)
    tokens = ExactTokens(model, loss_segment_tokens=7, mlp_tile_tokens=16)
    assert tokens.tiled_perceptrons == KINDS[kind][2]
    ours, found = trained(model, **more)
    assert float(ours) == pytest.approx(float(loss), rel=1e-6)
    require_near(found, expected)
    out = model(**batch())
    assert out.logits is None
    assert "logits" not in out
    assert out[0] is out.loss
    tokens.close()
    tokens.close()
    again, bits = trained(model, **more)
    assert torch.equal(again, loss)
    assert all(torch.equal(bits[name], each) for name, each in expected.items())


def test_what_is_no_training_with_labels_is_as_it_was() -> None:
    model = made("llama")
    expected = model(**batch())
    tokens = ExactTokens(model, mlp_tile_tokens=0)
    inputs = batch()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected.logits)
    model.eval()
    assert torch.equal(model(**inputs).loss, expected.loss)
    model.train()
    del inputs["labels"]
    assert torch.equal(model(**inputs).logits, expected.logits)
    tokens.close()


def test_arguments_by_place_and_tuples_are_understood() -> None:
    model, inputs = made("llama"), batch()
    expected = model(**inputs).loss
    tokens = ExactTokens(model)
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    loss, *rest = model(ids, mask, None, None, None, labels, return_dict=False)
    assert not any(isinstance(each, Tensor) for each in rest)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    given = model(ids, mask, labels=labels, shift_labels=shifted).loss
    assert torch.equal(given, loss)
    tokens.close()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bits_are_those_of_exact_without_offload(checkpointing: bool, spill_dir: Path) -> None:
    def run(activations: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        model = made("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        exact = {"mode": "exact", "loss_segment_tokens": 16, "mlp_tile_tokens": 16}
        plan = {"version": 1, "tokens": exact, **activations}
        with Session(model, plan) as session:
            for _ in range(2):  # the second one by a schedule
                with session.forward():
                    loss = model(**batch()).loss
                loss.backward()
            stats = session.stats()
            assert stats is None or stats.offloaded_bytes > 0
        return loss.detach(), {name: each.grad for name, each in model.named_parameters()}

    moved = {"mode": "ssd", "path": [str(spill_dir)], "min_tensor_bytes": 4096}
    (loss, here), (other, there) = run({}), run({"activations": moved})
    assert torch.equal(loss, other)
    assert all(torch.equal(there[name], each) for name, each in here.items())


def test_adapters_of_peft_train_alike() -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(made("llama"), peft.LoraConfig(r=4, target_modules=targets))
    for name, each in model.named_parameters():  # B begins as zeros
        torch.nn.init.normal_(each, std=0.1) if "lora_B" in name else None
    loss, expected = trained(model)
    tokens = ExactTokens(model, loss_segment_tokens=7, mlp_tile_tokens=16)
    assert tokens.tiled_perceptrons == 2
    assert "logits" not in model(**batch())
    ours, found = trained(model)
    assert float(ours) == pytest.approx(float(loss), rel=1e-6)
    assert found
    require_near(found, expected)
    names = set(model.state_dict())
    tokens.close()
    assert set(model.state_dict()) == names


def test_a_model_whose_loss_is_more_is_refused_in_its_first_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = made("gemma2")
    tokens = ExactTokens(model)
    monkeypatch.setattr(model.config, "final_logit_softcapping", 2.0)  # not as was seen
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM has a loss of .* by other logits"):
        model(**batch())
    tokens.close()

    class Regularised(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *inputs: Any, labels: Any = None, logits_to_keep: int = 0, **more: Any):  # type: ignore[no-untyped-def]
            out = super().forward(*inputs, labels=labels, logits_to_keep=logits_to_keep, **more)
            if labels is not None:
                out.loss = out.loss + 1e-2
            return out

    added = Regularised(transformers.LlamaConfig(**LLAMA)).train()
    tokens = ExactTokens(added)
    with pytest.raises(ValueError, match=r"Regularised has a loss of .* by the same logits"):
        added(**batch())
    tokens.close()


def test_autocast_is_as_it_is_within_the_models_forward() -> None:
    """As accelerate has it: around the model's own forward, and not around its hooks."""
    model = made("llama")

    def autocast(forward: Any) -> Any:
        def run(*inputs: Any, **named: Any) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return forward(*inputs, **named)

        return functools.wraps(forward)(run)

    model.forward = autocast(model.forward)
    loss, expected = trained(model)
    tokens = ExactTokens(model, loss_segment_tokens=16, mlp_tile_tokens=0)
    ours, found = trained(model)
    assert float(ours) == pytest.approx(float(loss), rel=1e-5)
    for name, each in expected.items():
        assert (found[name] - each).abs().max() <= 0.02 * each.abs().max(), name
    tokens.close()


def test_gradients_of_a_bf16_head_are_added_up_in_fp32() -> None:
    model = made("llama").bfloat16()
    loss, expected = trained(model)
    tokens = ExactTokens(model, loss_segment_tokens=2, mlp_tile_tokens=0)
    ours, found = trained(model)
    assert float(ours) == pytest.approx(float(loss), rel=1e-3)
    head = expected["lm_head.weight"].float()
    apart = (found["lm_head.weight"].float() - head).abs()
    assert bool((apart <= 2**-7 * head.abs() + 1e-4).all())  # two roundings
    tokens.close()


def test_what_would_be_lost_in_silence_is_refused() -> None:
    model = made("llama").half()
    tokens = ExactTokens(model)
    with pytest.raises(ValueError, match="train in bfloat16"):
        model(**batch())
    tokens.close()
    hooked = made("llama")
    hooked.lm_head.weight.register_hook(lambda gradient: 0.1 * gradient)
    with pytest.raises(ValueError, match="a hook of the head of LlamaForCausalLM"):
        ExactTokens(hooked)
    around = made("llama")
    tokens = ExactTokens(around)
    with pytest.warns(UserWarning, match="ran outside of a call of LlamaForCausalLM"):
        around.forward(**batch())
    tokens.close()


def test_a_forward_with_a_head_of_its_own_keeps_it() -> None:
    model = made("llama")
    tokens = ExactTokens(model)
    seen = []
    model.register_forward_pre_hook(
        lambda _module, _inputs, named: seen.append(named["labels"]), with_kwargs=True
    )
    model(**batch(), fused_lm_head=True)
    assert seen[0] is not None
    tokens.close()


def test_one_that_cannot_be_made_leaves_the_model_as_it_was() -> None:
    model = made("llama")
    own = Tiled(model.model.layers[1].mlp, 8)
    with pytest.raises(ValueError, match="already has a forward of its own"):
        ExactTokens(model)
    assert "forward" not in vars(model.model.layers[0].mlp)
    own.close()
    ExactTokens(model).close()


def test_models_that_cannot_be_cut_are_refused_by_name() -> None:
    bert = transformers.BertConfig(**SHAPE, intermediate_size=64, num_attention_heads=4)
    with pytest.raises(ValueError, match="the loss of BertForMaskedLM is ForMaskedLMLoss"):
        ExactTokens(transformers.BertForMaskedLM(bert))
    with pytest.raises(ValueError, match="Linear is no causal language model"):
        ExactTokens(nn.Linear(2, 2))
    model = made("llama")
    model.loss_function = lambda logits, labels, **more: logits.sum()
    with pytest.raises(ValueError, match=r"the loss of LlamaForCausalLM is <lambda>"):
        ExactTokens(model)
    shared = made("llama")
    shared.lm_head.weight.ds_id = 3
    with pytest.raises(ValueError, match="ZeRO-3"):
        Session(shared, {"version": 1, "tokens": {"mode": "exact"}})


def test_a_forward_that_fails_leaves_the_next_one_whole() -> None:
    model, inputs = made("llama"), batch()
    tokens = ExactTokens(model)
    expected = model(**inputs).loss
    with pytest.raises(IndexError):
        model(**{**inputs, "input_ids": inputs["input_ids"] + VOCAB})
    assert torch.equal(model(**inputs).loss, expected)
    tokens.close()
