"""The bytes of a step, as predicted from a model's shape, against those that PyTorch allocates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from examples.memory import StepMemory
from examples.models import MODELS, ModelConfig, call, recompute
from perfmodel.known_models import read_known_model
from perfmodel.layers import (
    CPU,
    CUDA,
    MEGATRON,
    TRANSFORMERS,
    TRANSFORMERS_CUDA,
    Kernels,
    Shape,
    stage_tape,
    tape_of,
)
from perfmodel.memory import step_bytes
from perfmodel.model import Model
from perfmodel.model_configs import model_of_config
from perfmodel.plain_models import PLAIN_MODELS, plain_model, plain_shape
from perfmodel.tape import Tape
from tests.perfmodel.test_model_configs import PUBLISHED

# batch, sequence, hidden, layers, heads, vocabulary, dropout: logits, layers or neither dominate.
SIZES = [
    (2, 64, 128, 2, 4, 256, 0.0),
    (4, 128, 256, 3, 4, 1000, 0.0),
    (2, 128, 256, 2, 2, 5000, 0.1),
    (3, 96, 192, 4, 8, 512, 0.0),
]
MODEL_CONFIGS = {name: config for name, (config, _) in PUBLISHED.items()}
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


GPT = Model(num_layers=4, hidden_size=64, num_heads=8, vocab_size=96, max_positions=32)
SHAPE = Shape(batch=2, seq_len=32)
SPLIT = 2 * 32 * 64 * 4  # bytes of the residual stream


def sent(tape: Tape) -> float:
    return sum(operator.network_bytes for operator in tape.operators)


def params(tape: Tape) -> int:
    return sum(operator.param_bytes for operator in tape.operators)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("sequence", [False, True])
def test_ranks_send_what_their_collectives_do(tensor: int, sequence: bool) -> None:
    shape = replace(SHAPE, tensor=tensor, sequence=sequence)
    one, two = (sent(tape_of(replace(GPT, num_layers=count), shape)) for count in (1, 2))
    # Behind attention and behind the perceptron: an all-reduce each, or the two halves of one.
    assert two - one == 2 * 2 * (tensor - 1) / tensor * SPLIT
    again = sum(each.backward_network_bytes for each in tape_of(GPT, shape).operators)
    gathers = 2 * GPT.num_layers + 1  # before each of the two, and before the head
    assert again == (gathers * (tensor - 1) / tensor * SPLIT if sequence else 0)
    assert sent(tape_of(GPT, SHAPE)) == 0


@pytest.mark.parametrize("kind", PLAIN_MODELS)
@pytest.mark.parametrize("more", [{}, {"num_experts": 4, "experts_per_token": 2}])
def test_ranks_together_multiply_as_much_as_one(kind: str, more: dict[str, Any]) -> None:
    # Without groups, of which ranks would have the same keys.
    model = replace(model_of(kind, (2, 64, 128, 2, 4, 256, 0.0)), num_kv_heads=4, **more)
    whole = [each.matmul_flops for each in tape_of(model, SHAPE).operators]
    for ranks in ({"tensor": 2}, {"tensor": 2, "sequence": True}, {"context": 4}):
        tape = tape_of(model, replace(SHAPE, **ranks))
        count = max(ranks.get("tensor", 1), ranks.get("context", 1))
        routed = 2.0 * 64 * 128 * model.num_experts * 2 * (1 + (kind == "t5"))
        doubled = routed if ranks.keys() == {"tensor"} else 0.0  # each rank routes every token
        assert count * sum(each.matmul_flops for each in tape.operators) == pytest.approx(
            sum(whole) + doubled
        )


def test_more_ranks_save_less_and_train_fewer_parameters_each() -> None:
    whole, shared = tape_of(GPT, SHAPE), tape_of(GPT, replace(SHAPE, tensor=8))
    all_shared = tape_of(GPT, replace(SHAPE, tensor=8, sequence=True))
    assert whole.saved_bytes() > shared.saved_bytes() > all_shared.saved_bytes()
    # A rank has all of what stands between maps: norms, positions, and the biases of sums.
    hidden, norms = GPT.hidden_size, 2 * GPT.num_layers + 1
    between = 4 * (norms * 2 * hidden + 32 * hidden + GPT.num_layers * 2 * hidden)
    assert 8 * (params(shared) - between) == params(whole) - between
    assert step_bytes(all_shared).worst.nbytes < step_bytes(shared).worst.nbytes


def test_a_part_of_a_sequence_sends_its_keys_and_values_round() -> None:
    tape = tape_of(GPT, replace(SHAPE, context=4))
    assert sent(tape) == GPT.num_layers * 3 * 2 * SPLIT // 4
    assert tape.saved_bytes() == pytest.approx(tape_of(GPT, SHAPE).saved_bytes() / 4, rel=1e-3)


def test_stages_together_are_the_whole_model() -> None:
    whole = tape_of(GPT, SHAPE)
    cut = [(range(1), True, False), (range(1, 3), False, False), (range(3, 4), False, True)]
    stages = [stage_tape(GPT, SHAPE, some, first=a, last=b) for some, a, b in cut]
    assert sum(map(params, stages)) == params(whole)
    assert [len(stage.blocks) for stage in stages] == [1, 2, 1]
    # What a stage is sent is saved by its first norm, as in the whole.
    assert sum(stage.saved_bytes() for stage in stages) == whole.saved_bytes()
    flops = [sum(each.matmul_flops for each in tape.operators) for tape in (whole, *stages)]
    assert sum(flops[1:]) == flops[0]
    for stage in stages:
        assert step_bytes(stage).left_bytes == 0
    everything = stage_tape(GPT, SHAPE, range(4), first=True, last=True)
    assert everything.saved_bytes() == whole.saved_bytes()


def test_stages_that_there_cannot_be_are_refused() -> None:
    for some in (range(0), range(2, 5), range(0, 4, 2), range(-1, 2)):
        with pytest.raises(ValueError, match=r"layers=range.* are not some of num_layers=4"):
            stage_tape(GPT, SHAPE, some, first=True, last=False)
    both = plain_model("t5", num_layers=2, hidden_size=64, num_heads=4, seq_len=64)
    assert stage_tape(both, SHAPE, range(2), first=True, last=True).operators
    for some, last in ((range(1), True), (range(2), False)):
        with pytest.raises(ValueError, match="cannot cut a model with encoder_layers=2; ") as error:
            stage_tape(both, SHAPE, some, first=True, last=last)
        assert "pipeline=1" in str(error.value)
        assert "range" not in str(error.value)


@pytest.mark.parametrize("kind", MODEL_CONFIGS)
@pytest.mark.parametrize("kernels", [CPU, CUDA, MEGATRON, TRANSFORMERS, TRANSFORMERS_CUDA])
def test_every_model_of_a_config_has_a_tape_whose_step_leaves_nothing(
    kind: str, kernels: Kernels
) -> None:
    model = model_of_config(MODEL_CONFIGS[kind])
    for shape in (
        Shape(batch=1, seq_len=16, element_bytes=2, kernels=kernels),
        Shape(batch=2, seq_len=16, kernels=kernels, tensor=2, sequence=True),
    ):
        for rank in (0, 4):
            tape = tape_of(model, shape, lora_rank=rank)
            for again in ((), range(len(tape.blocks))):
                found = step_bytes(tape, again)
                assert found.left_bytes == 0
                assert all(min(each.saved_bytes, each.other_bytes) >= 0 for each in found.moments)
            assert found.worst.nbytes > step_bytes(tape, range(len(tape.blocks))).saved_bytes


def layer_bytes(model: Model, shape: Shape) -> int:
    """Return what one more layer saves."""
    one, two = (
        tape_of(replace(model, num_layers=layers), shape).saved_bytes() for layers in (1, 2)
    )
    return two - one


def test_megatrons_layers_keep_no_repeated_heads_and_no_activated_gate() -> None:
    model, shape = read_known_model("llama-3-8b"), Shape(batch=1, seq_len=256, element_bytes=2)
    hidden, inner, kv = model.hidden_size, model.ffn_size, model.kv_size
    statistics = 4 * (2 + model.num_heads)  # of both norms, and of each head's softmax
    # Both norms with their maps, queries and what is attended; keys and values; fc1 and fc2.
    expected = 2 * (6 * hidden + 2 * kv + 3 * inner) + statistics
    assert layer_bytes(model, replace(shape, kernels=MEGATRON)) == shape.tokens * expected
    repeated, activated = 2 * (hidden - kv), inner
    assert layer_bytes(model, replace(shape, kernels=CUDA)) == shape.tokens * (
        expected + 2 * (repeated + activated)
    )


def test_megatrons_layers_without_a_gate_or_groups_are_plain_ones() -> None:
    model = Model(num_layers=1, hidden_size=64, num_heads=4, vocab_size=100, dropout=0.1)
    for fused in (True, False):
        plain, megatron = (
            Shape(
                batch=2,
                seq_len=16,
                element_bytes=2,
                kernels=replace(kernels, fused_attention=fused),
            )
            for kernels in (CUDA, MEGATRON)
        )
        assert layer_bytes(model, megatron) == layer_bytes(model, plain)


def test_scores_that_are_stored_are_of_repeated_heads() -> None:
    model = read_known_model("llama-3-8b")
    shape = Shape(
        batch=1, seq_len=64, element_bytes=2, kernels=replace(MEGATRON, fused_attention=False)
    )
    names = [each.name for each in tape_of(model, shape).operators]
    assert names.count("repeat") == 2 * model.num_layers
