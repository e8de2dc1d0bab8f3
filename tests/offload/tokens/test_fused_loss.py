"""A library's loss: taken where it is for, and asked for what the plain one gives."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload.tokens import fused_loss, segmented_cross_entropy
from offload.tokens.causal_lm import Finish
from offload.tokens.fused_loss import fused_cross_entropy

EPSILON = 2**-23


class LigersLoss:
    """What Liger's public class promises, by PyTorch."""

    def __init__(self, ignore_index: int, reduction: str, softcap: float | None) -> None:
        self._settings: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
        self._softcap = softcap

    def __call__(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Any) -> Tensor:
        logits = F.linear(_input, lin_weight, bias)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return F.cross_entropy(logits, target, **self._settings)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the library be installed, and the host be a device that it is for."""
    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = LigersLoss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(fused_loss, "_may_run_on", lambda _: True)
    fused_loss._liger.cache_clear()


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    yield
    fused_loss._liger.cache_clear()


def given() -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(13, (2, 9))
    targets[0, :4] = -100
    return torch.randn(2, 9, 8, requires_grad=True), nn.Linear(8, 13), targets


def asked(hidden: Tensor, head: nn.Module, targets: Tensor, **more: Any) -> Tensor | None:
    finish = more.pop("finish", Finish())
    return fused_cross_entropy(
        hidden, head, finish, targets, count=more.get("count"), ignored=more.get("ignored", -100)
    )


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("count", [None, 5, torch.tensor(7)])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_library_is_asked_for_what_segments_give(count: Any, cap: float | None) -> None:
    hidden, head, targets = given()
    finish = Finish(cap=cap)
    ours = asked(hidden, head, targets, finish=finish, count=count)
    assert ours is not None
    plain = segmented_cross_entropy(
        hidden,
        lambda x: finish(head(x)),
        targets,
        params=[*head.parameters()],
        count=count,
    )
    wanted = [hidden, *head.parameters()]
    found = [ours, *torch.autograd.grad(ours, wanted)]
    expected = [plain, *torch.autograd.grad(plain, wanted)]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 4 * 18 * EPSILON * other.abs().max()


@pytest.mark.usefixtures("liger")
def test_labels_that_do_not_count_are_named_to_the_library() -> None:
    hidden, head, targets = given()
    targets[targets == -100] = 12
    ours = asked(hidden, head, targets, ignored=12)
    assert ours is not None
    plain = segmented_cross_entropy(hidden, head, targets, ignored=12)
    assert float(ours.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("finish", [Finish(multiplied=2.0), Finish(divided=3.0)])
def test_logits_that_are_scaled_are_made_in_segments(finish: Finish) -> None:
    assert asked(*given(), finish=finish) is None


@pytest.mark.usefixtures("liger")
def test_a_head_that_is_adapted_hooked_or_of_another_type_is_run_in_segments() -> None:
    hidden, head, targets = given()
    assert asked(hidden, nn.Sequential(head), targets) is None
    assert asked(hidden, nn.Linear(8, 13, dtype=torch.bfloat16), targets) is None
    head.register_forward_hook(lambda *_: None)
    assert asked(hidden, head, targets) is None


@pytest.mark.usefixtures("liger")
def test_fp16_is_left_to_the_segments_which_refuse_it() -> None:
    hidden, head, targets = given()
    assert asked(hidden.half(), head.half(), targets) is None


def test_without_the_library_or_a_gpu_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(*given()) is None
    monkeypatch.setattr(fused_loss, "_may_run_on", lambda _: True)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    assert asked(*given()) is None
