"""Published formulas, against what their authors print, and ours against them."""

from __future__ import annotations

import pytest

from perfmodel.layers import CUDA, Shape, tape_of
from perfmodel.model import Model
from perfmodel.published import (
    deepspeed_zero2_bytes,
    deepspeed_zero3_bytes,
    layer_activation_bytes,
)
from perfmodel.replays.formulas import LAYERS, Compared, estimates, layer_bytes, saved_bytes


@pytest.mark.parametrize("case", [*estimates(), *layer_bytes()], ids=lambda case: case.case)
def test_ours_are_what_the_originals_return(case: Compared) -> None:
    # The formula leaves out means and deviations of a layer's norms.
    assert case.ours == pytest.approx(case.published, rel=1e-3 if "layer" in case.case else 0)


def test_estimators_agree_with_deepspeeds_own_where_it_is_installed() -> None:
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    stage2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    for params, devices, nodes, offload in ((123_457, 3, 4, True), (6_738_415_616, 8, 1, False)):
        two = deepspeed_zero2_bytes(params, devices, nodes, cpu_offload=offload)
        theirs = stage2.estimate_zero2_model_states_mem_needs(params, devices, nodes, offload)
        assert (two.host_bytes, two.device_bytes) == theirs
        three = deepspeed_zero3_bytes(params, 99, devices, nodes, cpu_offload=offload)
        theirs = stage3.estimate_zero3_model_states_mem_needs(params, 99, devices, nodes, offload)
        assert (three.host_bytes, three.device_bytes) == theirs[:2]


def test_selective_recompute_saves_what_its_paper_says() -> None:
    # Section 5: with it, GPT-3's layers need 70 % less memory, and MT-NLG's 65 %.
    for name, percent in (("175B (GPT-3)", 70), ("530B (MT-NLG)", 65)):
        heads, hidden, batch = LAYERS[name]
        whole = layer_activation_bytes(2048, batch, hidden, heads)
        selective = layer_activation_bytes(2048, batch, hidden, heads, recompute="selective")
        assert round(100 * (1 - selective / whole)) == percent
    assert layer_activation_bytes(2048, 1, 12288, 96) == 2048 * 12288 * (34 + 80)
    full = layer_activation_bytes(2048, 1, 12288, 96, 8, sequence=True, recompute="full")
    assert full == 2 * 2048 * 12288
    with pytest.raises(ValueError, match="recompute='some'"):
        layer_activation_bytes(1, 1, 1, 1, recompute="some")


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_tape_saves_what_the_published_formula_says(
    name: str, tensor: int, sequence: bool
) -> None:
    heads, hidden, batch = LAYERS[name]
    # Means and deviations of two norms, which it leaves out.
    statistics = 2 * 2 * 4 * batch * 2048 // (tensor if sequence else 1)
    formula = layer_activation_bytes(2048, batch, hidden, heads, tensor, sequence=sequence)
    assert saved_bytes(name, tensor=tensor, sequence=sequence) == formula + statistics


def test_a_kernel_of_attention_saves_less_than_the_formula() -> None:
    heads, hidden, batch = LAYERS["22B"]
    model = Model(num_layers=1, hidden_size=hidden, num_heads=heads, vocab_size=512)
    shape = Shape(batch=batch, seq_len=2048, element_bytes=2, kernels=CUDA)
    formula = layer_activation_bytes(2048, batch, hidden, heads)
    assert tape_of(model, shape).saved_bytes() < formula
