"""The bytes of a step, as predicted from a model's shape, against those that PyTorch allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from examples.memory import StepMemory
from examples.models import MODELS, ModelConfig, call, recompute
from perfmodel.layers import Shape, tape_of
from perfmodel.memory import step_bytes
from perfmodel.model import Model
from perfmodel.plain_models import plain_model, plain_shape

# batch, sequence, hidden, layers, heads, vocabulary, dropout: logits, layers or neither dominate.
SIZES = [
    (2, 64, 128, 2, 4, 256, 0.0),
    (4, 128, 256, 3, 4, 1000, 0.0),
    (2, 128, 256, 2, 2, 5000, 0.1),
    (3, 96, 192, 4, 8, 512, 0.0),
]
# BERT guesses a random part of all positions.
BOUNDS = {"bert": 0.02, "gpt": 0.001, "llama": 0.001, "t5": 0.001}


def model_of(kind: str, size: Any) -> Model:
    """Describe a model of `examples.models`."""
    _, seq_len, hidden, layers, heads, vocab, dropout = size
    return plain_model(
        kind,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        seq_len=seq_len,
        vocab_size=vocab,
        dropout=dropout,
    )


def shape_of(kind: str, size: Any) -> Shape:
    batch, seq_len, *_ = size
    return plain_shape(kind, batch=batch, seq_len=seq_len)


def trained(kind: str, size: Any, run: Any) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    batch, seq_len, hidden, layers, heads, vocab, dropout = size
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=vocab,
        seq_len=seq_len,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        dropout=dropout,
    )
    model = MODELS[kind](config, run)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(vocab, (batch, seq_len + 1))
    return model, (tokens[:, :-1], tokens[:, 1:])


def measured_peak(kind: str, size: Any, run: Any) -> int:
    model, tokens = trained(kind, size, run)
    for _ in range(2):  # the first makes what stays
        with StepMemory() as memory:
            model(*tokens).backward()
    return memory.peak_bytes


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_peak_of_a_step_is_predicted_from_its_shape(kind: str, size: Any, mode: str) -> None:
    tape = tape_of(model_of(kind, size), shape_of(kind, size))
    again = range(len(tape.blocks)) if mode == "recompute" else ()
    predicted = step_bytes(tape, again).worst.nbytes
    peak = measured_peak(kind, size, recompute if again else call)
    assert predicted == pytest.approx(peak, rel=BOUNDS[kind])


LARGE = 64 << 10  # of saved tensors that leave


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_peak_of_a_step_whose_large_tensors_leave_is_predicted(
    kind: str, size: Any, spill_dir: Path
) -> None:
    tape = tape_of(model_of(kind, size), shape_of(kind, size))
    predicted = step_bytes(tape, leaves=lambda value: value.nbytes >= LARGE).worst.nbytes
    model, tokens = trained(kind, size, call)
    with offload.ActivationOffload(
        path=spill_dir, schedule="all", min_tensor_bytes=LARGE, staging_bytes=64 << 20
    ) as act:
        for _ in range(2):
            with StepMemory() as memory:
                with act.forward():
                    loss = model(*tokens)
                loss.backward()
                del loss
    assert predicted == pytest.approx(memory.peak_bytes, rel=max(0.01, 2 * BOUNDS[kind]))


@pytest.mark.parametrize("kind", MODELS)
def test_what_autograd_saves_is_on_the_tape(kind: str) -> None:
    size = SIZES[1]
    model, tokens = trained(kind, size, call)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    own |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    own.add(tokens[0].untyped_storage().data_ptr())
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*tokens)
    nbytes = sum(storage.nbytes() for storage in saved.values())
    predicted = tape_of(model_of(kind, size), shape_of(kind, size)).saved_bytes()
    assert predicted == pytest.approx(nbytes, rel=max(0.002, BOUNDS[kind]))
    loss.backward()


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_that_is_described_has_the_parameters_of_the_one_that_trains(kind: str) -> None:
    size = SIZES[1]
    model, _ = trained(kind, size, call)
    extra = size[2] if kind == "bert" else 0  # the token that hides others
    assert model_of(kind, size).num_params + extra == sum(p.numel() for p in model.parameters())


def test_what_no_tape_has_yet_is_refused_by_name() -> None:
    model = Model(num_layers=1, hidden_size=8, num_heads=2, vocab_size=9, num_experts=4)
    with pytest.raises(ValueError, match="a model with num_experts cannot be counted yet"):
        tape_of(model, Shape(batch=1, seq_len=4))
