"""Workloads, strategies and plans at random, for whichever tests go through many."""

from __future__ import annotations

from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from perfmodel.machine import known_machines, read_machine
from perfmodel.model import Model
from perfmodel.plan_file import ActivationsSection, Limits, Plan, Predicted
from perfmodel.workload import Parallel, Strategy, Workload

PATH = ("/nvme/spill",)
SIZES = st.integers(0, 1 << 60)
BIASES = ((True, True, True), (True, False, False), (False, False, False))


def tried(make: Any, **settings: Any) -> Any:
    """Return what is made of `settings`, or have another example taken where they do not fit."""
    try:
        return make(**settings)
    except ValueError:
        assume(False)


@st.composite
def gpt_models(draw: st.DrawFn) -> Model:
    """Models of the kind that Megatron's GPT is of."""
    heads = draw(st.sampled_from([2, 4, 8, 12]))
    attention, output, ffn = draw(st.sampled_from(BIASES))
    gated = draw(st.booleans())
    experts = draw(st.sampled_from([0, 0, 4, 8]))
    positions = draw(st.sampled_from(["learned", "rotary"]))
    dropout, of_scores = (draw(st.sampled_from([0.0, 0.1, 0.25])) for _ in range(2))
    return tried(
        Model,
        name=draw(st.sampled_from(["", "a", "b"])),
        num_layers=draw(st.sampled_from([1, 2, 4, 8, 12])),
        hidden_size=heads * draw(st.sampled_from([8, 64])),
        num_heads=heads,
        num_kv_heads=draw(st.sampled_from([heads, heads // 2, 1])),
        head_size=draw(st.sampled_from([0, 32, 64])),
        ffn_size=draw(st.sampled_from([0, 96, 704])),
        gated=gated,
        activation="silu" if gated else draw(st.sampled_from(["gelu", "gelu_tanh"])),
        norm=draw(st.sampled_from(["layer", "rms"])),
        head_norms=draw(st.booleans()),
        attention_bias=attention,
        output_bias=output,
        ffn_bias=ffn,
        positions=positions,
        rotary_share=draw(st.sampled_from([0.5, 1.0])) if positions == "rotary" else 1.0,
        max_positions=draw(st.sampled_from([0, 64, 256])),
        vocab_size=draw(st.integers(1, 1000)),
        tied=draw(st.booleans()),
        num_experts=experts,
        experts_per_token=draw(st.integers(1, 2)) if experts else 1,
        dropout=dropout,
        attention_dropout=None if of_scores == dropout else of_scores,
    )


@st.composite
def workloads(draw: st.DrawFn, framework: str | None = None) -> Workload:
    """Steps of `gpt_models` on up to a few hundred ranks."""
    few, pipeline = st.sampled_from([1, 1, 2, 4]), draw(st.sampled_from([1, 1, 2, 4]))
    parallel = tried(
        Parallel,
        data=draw(few),
        zero_stage=draw(st.integers(0, 3)),
        tensor=draw(few),
        sequence=draw(st.booleans()),
        pipeline=pipeline,
        chunks=draw(st.sampled_from([1, 2])) if pipeline > 1 else 1,
        context=draw(few),
    )
    return tried(
        Workload,
        model=draw(gpt_models()),
        seq_len=draw(st.sampled_from([64, 128])),
        micro_batch=draw(st.integers(1, 3)),
        accumulation=draw(st.sampled_from([1, 2, 4, 8])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        parallel=parallel,
        framework=framework or draw(st.sampled_from(["torch", "deepspeed", "megatron"])),
        fused_attention=draw(st.booleans()),
    )


@st.composite
def strategies(draw: st.DrawFn, layers: int = 1) -> Strategy:
    """What may be chosen for a model of so many layers."""
    optimizer = draw(st.sampled_from(["offload", "torch"]))
    several = ["device", "host", "ssd", "host=0.25,ssd=0.75", "device=0.5,host=0.5"]
    mode = draw(st.sampled_from(["keep", "recompute", "host", "ssd"]))
    numbers = st.sets(st.integers(0, layers - 1)).map(lambda each: tuple(sorted(each)))
    return Strategy(
        activations=mode,
        memory_bytes=draw(st.none() | SIZES),
        recompute=draw(st.none() | numbers) if mode != "keep" else None,
        optimizer=optimizer,
        placement=draw(st.sampled_from(several)) if optimizer == "offload" else "device",
        update_schedule=draw(st.sampled_from(["auto", "host", "device", "share=0.5", "stride=2"])),
        early_gradients=draw(st.booleans()),
        staging_bytes=draw(st.integers(4096, 1 << 40)),
        min_tensor_bytes=draw(SIZES),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans made for something, and plans as somebody writes them by hand."""
    some = st.none() | SIZES
    limits = Limits(
        device_bytes=draw(some), host_bytes=draw(some), ssd_write_bytes_per_day=draw(some)
    )
    report = draw(st.none() | st.text(min_size=1))
    if draw(st.booleans()):
        section = {"mode": draw(st.sampled_from(["auto", "ssd"])), "path": ["/nvme", "/other"]}
        activations = ActivationsSection.from_mapping(section)
        return Plan(
            activations=activations,
            limits=limits,
            report=report,
            micro_batch=draw(st.none() | st.integers(1, 1 << 30)),
        )
    workload = draw(workloads())
    seconds = st.floats(0, 1e6)
    predicted = Predicted(
        step_s=draw(seconds),
        peak_device_bytes=draw(SIZES),
        peak_host_bytes=draw(SIZES),
        ssd_bytes=draw(SIZES),
        ssd_write_bytes=draw(SIZES),
        tokens_per_s=draw(seconds),
    )
    name = draw(st.none() | st.sampled_from(list(known_machines())))
    return Plan.of(
        workload,
        draw(strategies(workload.model.num_layers)),
        machine=read_machine(name) if name else None,
        path=PATH,
        limits=limits,
        report=report,
        predicted=draw(st.none() | st.just(predicted)),
    )
