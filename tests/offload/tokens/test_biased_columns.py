"""Perceptrons that save some inner channels: an exact forward, and a gradient said to be off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import Session
from offload.tokens.biased_columns import BiasedColumns
from tests.offload.tokens import sparse_llama

pytest.importorskip("transformers")

HIDDEN, INNER, TOKENS = 8, 20, 24


class Perceptron(nn.Module):
    def __init__(self, *, trained: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)
        self.act_fn = nn.SiLU()
        self.requires_grad_(trained)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, TOKENS // 2, HIDDEN, requires_grad=True)


def test_the_output_is_exact_and_with_all_channels_the_gradient_too() -> None:
    module, x = Perceptron(), inputs()
    whole = module(x)
    weights = torch.randn(whole.shape)
    [expected] = torch.autograd.grad(whole, [x], weights)
    found = BiasedColumns(module, 1.0, tile_tokens=10)
    out = module(x)
    assert torch.allclose(out, whole, atol=1e-6)
    [gradient] = torch.autograd.grad(out, [x], weights)
    assert torch.allclose(gradient, expected, atol=1e-6)
    found.close()
    assert torch.equal(module(x), whole)
    assert "forward" not in vars(module)


def test_the_gradient_is_that_of_the_largest_channels_alone() -> None:
    module, x = Perceptron(), inputs()
    with torch.no_grad():
        active = module.act_fn(module.gate_proj(x)) + module.up_proj(x)
        sizes = active.flatten(0, 1).norm(dim=0)
    columns = sizes.topk(5).indices
    part = module.act_fn(module.gate_proj(x)[..., columns]) * module.up_proj(x)[..., columns]
    weights = torch.randn(x.shape)
    [expected] = torch.autograd.grad(part @ module.down_proj.weight[:, columns].T, [x], weights)
    saved: list[int] = []
    BiasedColumns(module, 0.25, tile_tokens=TOKENS)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: saved.append(each.nbytes) or each, lambda each: each
    ):
        out = module(x)
    [gradient] = torch.autograd.grad(out, [x], weights)
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert sum(saved) == 2 * TOKENS * 5 * 4 + 5 * 8


def test_autocast_has_its_gradient_in_lower_precision_and_no_more() -> None:
    module, x = Perceptron(), inputs()
    weights = torch.randn(x.shape)
    columns = BiasedColumns(module, 1.0, tile_tokens=TOKENS)  # of which none differ by rounding
    [expected] = torch.autograd.grad(module(x), [x], weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    [found] = torch.autograd.grad(out.float(), [x], weights)
    columns.close()
    assert out.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.999


def test_dense_steps_have_the_gradient_of_all_channels() -> None:
    torch.manual_seed(0)
    rule = {**sparse_llama.RULE, "biased_mlp_columns": 0.1, "warm_up_steps": 1, "ratio": 1e-9}
    given = sparse_llama.batch()

    def gradient(plan: dict[str, Any], *, fallen: bool = False) -> Tensor:
        model = sparse_llama.made()
        for name, param in model.named_parameters():
            param.requires_grad_("mlp" not in name)
        with Session(model, plan) as session:
            if fallen:
                session.sparsity.fallen_back = True  # type: ignore[union-attr]
            with session.forward():
                loss = model(**given).loss
            loss.backward()
        found: Tensor = model.model.embed_tokens.weight.grad
        return found

    def sparse(rule: dict[str, Any]) -> dict[str, Any]:
        return {"version": 1, "tokens": {"mode": "sparse", "sparse": rule}}

    dense = gradient({"version": 1, "tokens": {"mode": "exact"}})
    assert torch.equal(gradient(sparse(rule)), dense)
    no_warm_up = {**rule, "warm_up_steps": 0}
    assert torch.equal(gradient(sparse(no_warm_up), fallen=True), dense)
    assert not torch.allclose(gradient(sparse(no_warm_up)), dense, rtol=1e-2)


def test_what_would_go_without_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="weights are trained"):
        BiasedColumns(Perceptron(trained=True), 0.2, tile_tokens=8)
    with pytest.raises(ValueError, match="Linear is not a gate_proj"):
        BiasedColumns(nn.Linear(2, 2), 0.2, tile_tokens=8)


def test_a_plan_takes_it_in_layers_that_leave_tokens_out() -> None:
    model = sparse_llama.made()
    for name, param in model.named_parameters():
        param.requires_grad_("self_attn" in name)
    given = sparse_llama.batch()
    rule: dict[str, Any] = {**sparse_llama.RULE, "ratios": [1.0, 0.5, 0.5, 1.0]}

    def step(**more: Any) -> tuple[float, list[Tensor]]:
        plan = {"version": 1, "tokens": {"mode": "sparse", "sparse": {**rule, **more}}}
        with Session(model, plan) as session, session.forward():
            loss = model(**given).loss
            loss.backward()
        found = [each.grad for each in model.parameters() if each.grad is not None]
        model.zero_grad()
        return float(loss.detach()), found

    loss, whole = step()
    biased, part = step(biased_mlp_columns=0.2)
    assert biased == pytest.approx(loss, rel=1e-6)
    cosines = [
        float(torch.cosine_similarity(one.flatten(), other.flatten(), 0))
        for one, other in zip(whole, part, strict=True)
    ]
    assert min(cosines) < 0.999
    assert cosines[-1] > 0.9999, "behind the last one nothing is biased"
    assert not any("forward" in vars(each) for each in model.modules())
