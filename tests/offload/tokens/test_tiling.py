"""Perceptrons over tiles of the sequence: the whole one's outputs, in a tile's memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from offload import ActivationOffload
from offload.tokens import Tiled
from offload.tokens.tiling import is_position_wise

CHANNELS = 32


class Perceptron(nn.Module):
    """Two maps, and what is between them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(CHANNELS, 128), nn.Linear(128, CHANNELS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(torch.nn.functional.silu(self.up(x))))


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    module(x).square().sum().backward()
    assert x.grad is not None
    found = [x.grad]
    for param in module.parameters():
        assert param.grad is not None
        found.append(param.grad.clone())
        param.grad = None
    return found


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("shape", [(1, 50), (3, 17), (2, 4)])
def test_outputs_and_gradients_are_the_whole_ones(again: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module, x = Perceptron(), torch.randn(*shape, CHANNELS)
    whole, of_whole = module(x), gradients(module, x)
    tiled = Tiled(module, 8, again=again)
    assert torch.allclose(module(x), whole, rtol=0, atol=1e-5)
    for found, expected in zip(gradients(module, x), of_whole, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    tiled.close()
    tiled.close()
    assert "forward" not in vars(module)
    assert torch.equal(module(x), whole)


def test_a_tile_that_runs_again_draws_the_same_dropout() -> None:
    module, x = Perceptron(dropout=0.5), torch.randn(1, 40, CHANNELS)
    found = []
    for again in (False, True):
        torch.manual_seed(7)
        tiled = Tiled(module, 16, again=again)
        found.append(gradients(module, x))
        tiled.close()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_tiles_that_run_again_save_what_enters_them_alone() -> None:
    module, x = Perceptron(), torch.randn(1, 64, CHANNELS)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape[-1] if tensor.dim() == 3 else 0)
        return tensor

    for again, widest in ((False, 128), (True, CHANNELS)):
        saved.clear()
        tiled = Tiled(module, 16, again=again)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x.requires_grad_())
        tiled.close()
        assert max(saved, default=0) <= widest
        assert again or max(saved) == widest


def test_bits_are_the_same_where_tiles_leave_for_the_ssd(spill_dir: str) -> None:
    torch.manual_seed(0)
    module, x = Perceptron(), torch.randn(1, 512, CHANNELS)
    tiled = Tiled(module, 64)
    here = gradients(module, x)
    settings = {"tier": "ssd", "path": str(spill_dir), "min_tensor_bytes": 4096}
    with ActivationOffload(**settings) as act:
        x = x.clone().requires_grad_()
        with act.forward():
            loss = module(x).square().sum()
        loss.backward()
        assert act.stats().offloaded_bytes > 0
    found = [x.grad, *(param.grad for param in module.parameters())]
    assert all(torch.equal(one, other) for one, other in zip(here, found, strict=True))
    tiled.close()


def test_what_is_no_sequence_goes_through_whole() -> None:
    module = Perceptron()
    tiled = Tiled(module, 2)
    flat = torch.randn(9, CHANNELS)
    assert torch.equal(module(flat), tiled._whole(flat))
    tiled.close()


def test_a_module_with_a_forward_of_its_own_is_refused() -> None:
    module = Perceptron()
    first = Tiled(module, 8)
    with pytest.raises(ValueError, match="Perceptron already has a forward of its own"):
        Tiled(module, 8)
    first.close()
    with pytest.raises(ValueError, match="tokens=0"):
        Tiled(module, 0)


def test_what_mixes_tokens_is_not_position_wise() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(CHANNELS, 8), nn.Linear(8, CHANNELS)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x.cumsum(dim=1)))

    class Wants(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask

    dropping = Perceptron(dropout=0.5).train()
    assert is_position_wise(dropping, CHANNELS)
    assert dropping.training
    assert dropping.dropout.training
    assert not is_position_wise(Mixing(), CHANNELS)
    assert not is_position_wise(Wants(), CHANNELS)
    assert not is_position_wise(nn.Linear(CHANNELS, 2), CHANNELS)
