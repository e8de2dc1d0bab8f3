"""Times of operators: flops by the curve of products, the rest by bytes, own rates first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perfmodel.layers import tape_of
from perfmodel.machine import Curve, Device, read_machine
from perfmodel.operator_times import operator_times
from perfmodel.plain_models import PLAIN_MODELS, plain_model, plain_shape
from perfmodel.tape import TapeWriter

MATMUL, MEMORY = 1e9, 1e6
DEVICE = Device(
    name="slow",
    memory_bytes=1 << 30,
    matmul_flops_per_s={"float32": Curve((1.0,), (MATMUL,))},
    memory_bytes_per_s=Curve((1.0,), (MEMORY,)),
)


def test_a_map_takes_its_flops_once_forward_and_twice_backward() -> None:
    writer = TapeWriter()
    x = writer.value("x", 0)
    writer.run("linear", [x], 0, saves=[x], param_bytes=1000, matmul_flops=5e8)
    times = operator_times(writer.operators, DEVICE, "float32")
    assert times.forward_s == (0.5,)
    # Its parameters' gradient is added to what there is: two read, one written.
    assert times.backward_s == pytest.approx((1.0 + 3 * 1000 / MEMORY,))


def test_a_map_of_inputs_that_need_no_gradient_has_one_product_less() -> None:
    writer = TapeWriter()
    x = writer.value("tokens", 0, trained=False)
    writer.run("linear", [x], 0, saves=[x], param_bytes=1, matmul_flops=5e8)
    assert operator_times(writer.operators, DEVICE, "float32").backward_s[0] == pytest.approx(
        0.5, rel=1e-4
    )


def test_what_is_no_product_takes_the_bytes_that_it_moves() -> None:
    writer = TapeWriter()
    x = writer.value("x", 500)
    writer.run("gelu", [x], saves=[x])
    times = operator_times(writer.operators, DEVICE, "float32")
    assert times.forward_s == pytest.approx((1000 / MEMORY,))
    assert times.backward_s == pytest.approx((2000 / MEMORY,))


def test_an_operators_own_rate_comes_first() -> None:
    writer = TapeWriter()
    x = writer.value("x", 500)
    writer.run("gelu", [x], saves=[x])
    rates = {"gelu": Curve((1.0,), (100.0,)), "gelu backward": Curve((1.0,), (50.0,))}
    times = operator_times(
        writer.tape().operators, replace(DEVICE, operators_per_s=rates), "float32"
    )
    assert (*times.forward_s, *times.backward_s) == (10.0, 20.0)


def test_attention_takes_its_time_by_the_length_of_sequences_and_by_type() -> None:
    def seconds(sequences: int, length: int, dtype: str) -> float:
        writer = TapeWriter()
        queries = [writer.value(name, 4 * sequences * length) for name in ("q", "k", "v")]
        flops = 2.0 * sequences * length * length
        writer.run("attention", queries, saves=queries, matmul_flops=flops)
        [forward_s], [backward_s] = (
            getattr(operator_times(writer.operators, device, dtype), way)
            for way in ("forward_s", "backward_s")
        )
        assert backward_s == 2.5 * flops / MATMUL
        return forward_s / flops

    # Of 100 and of 1,000 positions: half of either in flops for each byte of queries.
    curve = Curve((50.0, 500.0), (1e6, 1e7))
    device = replace(DEVICE, operators_per_s={"attention float32": curve})
    assert seconds(1, 100, "float32") == seconds(100, 100, "float32") == pytest.approx(1e-6)
    assert seconds(1, 1000, "float32") == pytest.approx(1e-7)
    both = {"float32": DEVICE.matmul_flops_per_s["float32"]}
    device = replace(device, matmul_flops_per_s={**both, "bfloat16": both["float32"]})
    assert seconds(1, 100, "bfloat16") == pytest.approx(1 / MATMUL), "fp32's rate is none of its"


@pytest.mark.parametrize("name", ["attention", "attention to all"])
def test_the_backward_of_attention_computes_scores_again_unless_its_rate_is_known(
    name: str,
) -> None:
    writer = TapeWriter()
    queries = [writer.value(part, 400) for part in ("q", "k", "v")]
    writer.run(name, queries, saves=queries, matmul_flops=1e6)
    # Four products to the forward's two, and one of those once more.
    times = operator_times(writer.operators, DEVICE, "float32")
    assert times.backward_s == (pytest.approx(2.5 * 1e6 / MATMUL),)
    # A rate is of twice the forward's flops, as it is measured.
    rates = {"attention backward float32": Curve((1.0,), (1e8,))}
    times = operator_times(writer.operators, replace(DEVICE, operators_per_s=rates), "float32")
    assert times.backward_s == (pytest.approx(2 * 1e6 / 1e8),)


@pytest.mark.parametrize("machine", ["h100-sxm", "h200-sxm", "dos-h100"])
@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [("attention", 284.1e12, 287.1e12), ("attention to all", 369.9e12, 290.6e12)],
)
def test_attention_on_hopper_is_about_as_fast_as_its_kernel_was_measured_by_others(
    machine: str, name: str, forward: float, backward: float
) -> None:
    # FlashAttention-2 of 8192 positions, heads of 128: Dao-AILab/flash-attention, pull request
    # 1791. Flops of half of all pairs where it is causal; a backward is said to have 2.5 times as
    # many.
    length, channels = 8192, 2048
    flops = 4.0 * length * length * channels * (0.5 if name == "attention" else 1)
    writer = TapeWriter()
    parts = [writer.value(part, 2 * length * channels) for part in ("q", "k", "v")]
    writer.run(name, parts, saves=parts, matmul_flops=flops)
    device = read_machine(machine).device
    times = operator_times(writer.operators, device, "bfloat16")
    assert times.forward_s[0] == pytest.approx(flops / forward, rel=0.2)
    assert times.backward_s[0] == pytest.approx(2.5 * flops / backward, rel=0.2)


def test_attention_on_ampere_is_at_most_what_its_kernel_reaches() -> None:
    # Dao (2023): 73 % of peak forward and 63 % backward, at best.
    for machine in ("a100-40gb-pcie", "a100-40gb-sxm", "a100-80gb-pcie", "a100-80gb-sxm"):
        rates = read_machine(machine).device.operators_per_s
        for causal in ("", " to all"):
            ahead, back = (
                max(rates[f"attention{causal}{way} bfloat16"].rates) for way in ("", " backward")
            )
            assert 0.6 * 312e12 < ahead < 0.74 * 312e12
            assert 0.5 * 312e12 < back * 2.5 / 2 < 0.64 * 312e12


def test_a_gradient_that_comes_twice_is_added() -> None:
    writer = TapeWriter()
    x = writer.value("x", 500)
    out = writer.run("gelu", [x], saves=[x])
    writer.run("add", [x, out], passes=True)
    times = operator_times(writer.operators, DEVICE, "float32")
    # The sum gives both the same memory; what comes back through gelu is added to it.
    assert times.backward_s == pytest.approx(((1500 + 2000) / MEMORY, 0.0))


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_a_model_takes_about_twice_as_long_backward_and_longer_with_slower_memory(
    kind: str,
) -> None:
    model = plain_model(kind, num_layers=2, hidden_size=256, num_heads=4, seq_len=128)
    tape = tape_of(model, plain_shape(kind, batch=4, seq_len=128))
    laptop = read_machine("laptop").device
    times = operator_times(tape.operators, laptop, "float32")
    assert 1.5 < sum(times.backward_s) / sum(times.forward_s) < 2.5
    slower = replace(laptop, memory_bytes_per_s=Curve((1.0,), (1e9,)))
    assert operator_times(tape.operators, slower, "float32").total_s > times.total_s


def test_a_type_without_a_rate_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"dtype='bfloat16': 'slow' has rates for float32"):
        operator_times([], DEVICE, "bfloat16")
