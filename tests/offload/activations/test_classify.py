"""What cannot be restored exactly is recognised, with its reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offload.activations.classify import parameter_of_cast, reason_to_pass, span_of


class Tagged(torch.Tensor):
    """A subclass of no behaviour of its own."""


def base_of_parameter() -> torch.Tensor:
    return nn.Parameter(torch.ones(8, 8)).t()


PASSED = {
    "parameter": lambda: nn.Parameter(torch.ones(4)),
    "parameter's transpose": base_of_parameter,
    "frozen parameter": lambda: nn.Parameter(torch.ones(4), requires_grad=False),
    "leaf": lambda: torch.ones(4, requires_grad=True),
    "subclass": lambda: torch.ones(4).as_subclass(Tagged),
    "coo": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
    "meta": lambda: torch.ones(4, device="meta"),
    "empty": lambda: torch.ones(0, 3),
}
REASONS = {
    "parameter": "parameter",
    "parameter's transpose": "parameter",
    "frozen parameter": "parameter",
    "leaf": "parameter",
    "subclass": "subclass",
    "coo": "sparse",
    "csr": "sparse",
    "nested": "nested",
    "jagged": "subclass",
    "quantized": "quantized",
    "meta": "device",
    "empty": "small",
}


@pytest.mark.parametrize("name", PASSED)
def test_what_stays_is_given_its_reason(name: str) -> None:
    assert reason_to_pass(PASSED[name](), 1) == REASONS[name]


def test_the_minimum_is_the_first_size_that_goes() -> None:
    tensor = torch.ones(256)
    assert reason_to_pass(tensor, 1024) is None
    assert reason_to_pass(tensor, 1025) == "small"


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.ones(10)[3:],
        lambda: torch.ones(10, 10).t()[2:, 1:],
        lambda: torch.ones(10, 1).expand(10, 5),
        lambda: torch.ones(()),
        lambda: torch.ones(100).as_strided((3, 4), (20, 0), 7),
    ],
)
def test_a_span_is_the_first_and_last_byte_that_a_view_touches(view: object) -> None:
    tensor: torch.Tensor = view()  # type: ignore[operator]
    whole = torch.zeros(tensor.untyped_storage().nbytes() // 4)
    whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(1)
    touched = whole.nonzero().flatten().tolist()
    assert span_of(tensor) == (touched[0] * 4, (touched[-1] + 1) * 4)


def test_a_cast_and_its_views_lead_to_their_parameter() -> None:
    p = nn.Parameter(torch.randn(8, 8))
    copy = p.to(torch.bfloat16)
    assert parameter_of_cast(copy) is p
    assert parameter_of_cast(copy.t()) is p


def no_cast() -> dict[str, torch.Tensor]:
    p = nn.Parameter(torch.randn(8, 8))
    changed = p.to(torch.bfloat16)
    with torch.no_grad():
        changed.mul_(2)
    return {
        "the parameter": p,
        "a product": p.to(torch.bfloat16) * 2,
        "a wider copy": p.to(torch.float64),
        "a detached copy": p.detach().to(torch.bfloat16),
        "a cast of a product": (p * 2).to(torch.bfloat16),
        "a cast of a view": p.t().to(torch.bfloat16),
        "another memory format": nn.Parameter(torch.randn(2, 3, 4, 5)).to(
            torch.bfloat16, memory_format=torch.channels_last
        ),
        "a changed cast": changed,
        "a negated view": torch._neg_view(p.to(torch.bfloat16)),
        "other bits": p.to(torch.bfloat16).view(torch.float16),
    }


@pytest.mark.parametrize("name", no_cast())
def test_what_the_parameter_cannot_make_again_is_no_cast(name: str) -> None:
    assert parameter_of_cast(no_cast()[name]) is None
