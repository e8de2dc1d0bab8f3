"""Bytes of model states, against published formulas, and what must hold of any strategy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.known_models import read_known_model
from perfmodel.plain_models import PLAIN_MODELS, plain_model
from perfmodel.plan import DTYPES, TIERS, OptimizerConfig
from perfmodel.published import deepspeed_zero2_bytes, deepspeed_zero3_bytes
from perfmodel.states import PHASES, Held, held, held_bytes
from perfmodel.workload import FRAMEWORKS, Parallel, Strategy, Workload

# All sizes are multiples of 128: ranks have equal shares.
MODEL = plain_model("gpt", num_layers=8, hidden_size=256, num_heads=4, seq_len=128, vocab_size=1024)
PARAMS = MODEL.num_params
PLACEMENTS = ("device", "host", "ssd", "host=0.4,ssd=0.6", "device=0.3,host=0.3,ssd=0.4")
SCHEDULES = ("auto", "host", "device", "share=0.59", "stride=2", "stride=0")


def workload(framework: str = "deepspeed", **changes: Any) -> Workload:
    parallel = {key: changes.pop(key) for key in [*changes] if key in Parallel.__dataclass_fields__}
    settings = {"seq_len": 128, "framework": framework, **changes}
    return Workload(model=MODEL, parallel=Parallel(**parallel), **settings)


def named(items: tuple[Held, ...], *names: str, tier: str = "device") -> int:
    """Add up what has these names."""
    return sum(each.nbytes for each in items if each.name in names and each.tier == tier)


TORCH, ON_HOST = Strategy(optimizer="torch"), Strategy(placement="host")
STATES = ("parameters", "gradients", "unreduced gradients", "optimizer states")


# ---- published formulas --------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_zero_1_holds_what_its_paper_says(ranks: int) -> None:
    # Rajbhandari et al. (2020), figure 1: 2 and 2 bytes of each parameter, and 12 divided. Where a
    # step has one backward, DeepSpeed lets go of gradients as they are reduced.
    found = held(workload(data=ranks, zero_stage=1, accumulation=2), TORCH)
    assert named(found, *STATES) == (2 + 2) * PARAMS + 12 * PARAMS // ranks


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_zero_2_holds_what_deepspeeds_estimator_counts(ranks: int) -> None:
    found = held(workload(data=ranks, zero_stage=2), TORCH)
    theirs = deepspeed_zero2_bytes(PARAMS, ranks, cpu_offload=False).device_bytes
    # Theirs has no copy in which gradients are put one behind the other, and gradients of tensors
    # on the border between two ranks on one of them only.
    rest = named(found, "parameters", "fp32 gradients", "optimizer states")
    assert rest == theirs - 2 * PARAMS // ranks
    largest = 2 * 1024 * 256
    over = rest + named(found, "gradients") - theirs
    assert over == 0 if ranks == 1 else 0 <= over <= 2 * largest


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_zero_2_with_offload_holds_what_deepspeeds_estimator_counts(ranks: int) -> None:
    found = held(workload(data=ranks, zero_stage=2), ON_HOST)
    theirs = deepspeed_zero2_bytes(PARAMS, ranks, buffer_factor=1.0)
    # Theirs multiplies by 1.5 for buffers, of which ours have names; with more than four ranks it
    # says what the models need that each of them makes at the start.
    assert ranks * named(found, "fp32 gradients", "optimizer states", tier="host") == (
        theirs.host_bytes
    )
    assert named(found, *STATES) == theirs.device_bytes


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("offload", [False, True])
def test_zero_3_holds_what_deepspeeds_estimator_counts(ranks: int, *, offload: bool) -> None:
    found = held(workload(data=ranks, zero_stage=3), ON_HOST if offload else TORCH)
    largest = 1024 * 256
    theirs = deepspeed_zero3_bytes(
        PARAMS, largest, ranks, cpu_offload=offload, cpu_offload_params=False, buffer_factor=1.0
    )
    # Theirs has one layer gathered, and ours as many as may be (stage3_max_live_parameters).
    if offload:
        assert named(found, "parameters") == theirs.device_bytes - 4 * largest
        states = named(found, "fp32 gradients", "optimizer states", tier="host")
        assert ranks * states == theirs.host_bytes
        return
    # Theirs has one tensor in half precision less: parameters, or gradients.
    divided = named(found, "parameters", "gradients", "fp32 gradients", "optimizer states")
    assert divided - 2 * PARAMS // ranks == theirs.device_bytes - 4 * largest


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize(
    ("dtype", "alone", "divided"), [("float16", 4, 16), ("bfloat16", 6, 12), ("float32", 8, 8)]
)
def test_megatron_holds_what_its_documentation_says(
    dtype: str, alone: int, divided: int, ranks: int
) -> None:
    # Its table of the distributed optimizer: bytes of each parameter.
    found = held(workload("megatron", data=ranks, zero_stage=1, dtype=dtype), TORCH)
    assert sum(each.nbytes for each in found) == alone * PARAMS + divided * PARAMS // ranks


def test_context_ranks_share_states_as_those_of_data_do() -> None:
    for framework in FRAMEWORKS:
        for stage in (1, 2, 3):
            both = held(workload(framework, data=2, context=4, zero_stage=stage), TORCH)
            assert both == held(workload(framework, data=8, zero_stage=stage), TORCH)


def test_adapters_alone_have_gradients_and_states() -> None:
    found = held(workload(lora_rank=4), Strategy(optimizer="torch"))
    # Queries, keys and values are one map; then the one behind, and two of the perceptron.
    adapters = 8 * 4 * (4 * 256 + 2 * 256 + 5 * 256 + 5 * 256)
    assert named(found, "parameters") == 2 * (PARAMS + adapters)
    assert named(found, "gradients") == 2 * adapters
    assert named(found, "optimizer states") == 12 * adapters


def test_deepspeeds_buckets_have_the_sizes_of_its_defaults() -> None:
    two = held(workload(data=8, zero_stage=2), TORCH)
    three = held(workload(data=8, zero_stage=3), TORCH)
    for found, phase in ((two, "backward"), (three, "")):
        assert [each.phase for each in found if each.name == "gradient buckets"] == [phase]
        assert named(found, "gradient buckets") == 2 * 500_000_000
    assert named(three, "gathered parameters") == 2 * PARAMS


@pytest.mark.parametrize("rank", [0, 8])
def test_fsdp_gathers_what_is_in_no_layer_beside_two_layers(rank: int) -> None:
    model = read_known_model("llama-3-8b")
    workload = Workload(
        model=model, seq_len=128, lora_rank=rank, parallel=Parallel(data=8, zero_stage=3)
    )
    found = held(workload, TORCH)
    # Token table, head and the last norm; of each layer four maps of attention, three others.
    outside = 2 * 128_256 * 4096 + 4096
    maps = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), *3 * [(4096, 14_336)]]
    layer = 2 * 4096 + sum(one * other for one, other in maps)
    adapters = rank * sum(map(sum, maps))
    assert named(found, "gathered parameters") == 2 * (outside + 2 * (layer + adapters))
    trained = 2 * adapters if rank else outside + 2 * layer
    assert named(found, "gradient buckets") == 2 * trained


def test_fsdp_gathers_no_more_than_there_is() -> None:
    parallel = Parallel(data=8, zero_stage=3)
    for layers in (1, 2):
        model = replace(MODEL, num_layers=layers)
        found = held(Workload(model=model, seq_len=128, parallel=parallel), TORCH)
        assert named(found, "gathered parameters") == 2 * model.num_params


@pytest.mark.parametrize("framework", ["deepspeed", "megatron"])
@pytest.mark.parametrize("stage", [0, 1])
def test_states_that_stay_on_the_device_need_no_buffers_of_another_framework(
    framework: str, stage: int
) -> None:
    given_workload = workload(framework, data=2, zero_stage=stage)
    stays, leaves = (
        held(given_workload, Strategy(placement=placement)) for placement in ("device", "host")
    )
    for tier in ("device", "host"):
        assert named(stays, "update buffers", tier=tier) == 0
    assert named(leaves, "update buffers", tier="host") > 0


def test_staging_of_activations_is_held_only_where_they_leave() -> None:
    for kind in ("keep", "recompute"):
        found = held(workload(), replace(TORCH, activations=kind))
        assert not [each for each in found if each.name == "staging of activations"]
    found = held(workload(), replace(TORCH, activations="ssd", staging_bytes=12345))
    assert named(found, "staging of activations", tier="host") == 12345


# ---- any strategy --------------------------------------------------------------------------------


@st.composite
def workloads(draw: st.DrawFn, framework: str = "") -> Workload:
    """Models whose sizes 64 ranks divide, so that equal shares are equal."""
    model = plain_model(
        draw(st.sampled_from(PLAIN_MODELS)),
        num_layers=draw(st.integers(1, 5)),
        hidden_size=128 * draw(st.integers(1, 3)),
        num_heads=4,
        seq_len=128,
        vocab_size=128 * draw(st.integers(1, 4)),
    )
    parallel = Parallel(
        data=1 << draw(st.integers(0, 3)),
        zero_stage=draw(st.integers(0, 3)),
        context=1 << draw(st.integers(0, 1)),
    )
    return Workload(
        model=model,
        seq_len=128,
        framework=framework or draw(st.sampled_from(FRAMEWORKS)),
        dtype=draw(st.sampled_from(DTYPES)),
        lora_rank=draw(st.sampled_from([0, 8])),
        accumulation=draw(st.integers(1, 2)),
        parallel=parallel,
    )


@st.composite
def strategies(draw: st.DrawFn) -> Strategy:
    """Any placement, schedule and way of activations."""
    activations = draw(st.sampled_from(["keep", "recompute", "host", "ssd"]))
    if draw(st.booleans()):
        return Strategy(optimizer="torch", activations=activations)
    return Strategy(
        activations=activations,
        placement=draw(st.sampled_from(PLACEMENTS)),
        update_schedule=draw(st.sampled_from(SCHEDULES)),
        early_gradients=draw(st.booleans()),
    )


SETTINGS = st.builds(
    OptimizerConfig,
    subgroup_params=st.sampled_from([1000, 4096, 1 << 22]),
    gradient_bytes=st.sampled_from([None, 0, 100_000, 1 << 30]),
)


def in_memory(items: tuple[Held, ...]) -> int:
    """Return what host and device hold at worst."""
    return max(
        sum(held_bytes(items, tier, phase) for tier in ("device", "host")) for phase in PHASES
    )


@given(workloads(), strategies(), SETTINGS, st.booleans())
def test_nothing_is_less_than_nothing_and_memory_is_one_without_a_device(
    given_workload: Workload, strategy: Strategy, settings: OptimizerConfig, alone: bool
) -> None:
    found = held(given_workload, strategy, device_is_host=alone, settings=settings)
    assert all(each.nbytes > 0 for each in found)
    for tier in TIERS:
        for phase in PHASES:
            assert held_bytes(found, tier, phase) >= held_bytes(found, tier)
    assert not alone or not any(each.pinned or each.tier == "host" for each in found)


@given(workloads(), strategies(), SETTINGS, st.booleans())
def test_more_ranks_of_data_never_hold_more_each(
    given_workload: Workload, strategy: Strategy, settings: OptimizerConfig, alone: bool
) -> None:
    def of(data: int) -> tuple[int, int]:
        more = replace(given_workload.parallel, data=data, zero_stage=stage)
        found = held(
            replace(given_workload, parallel=more),
            strategy,
            device_is_host=alone,
            settings=settings,
        )
        return in_memory(found), held_bytes(found, "ssd")

    stage = max(1, given_workload.parallel.zero_stage)
    data = given_workload.parallel.data
    few, many = of(data), of(2 * data)
    assert many[0] <= few[0]
    assert many[1] <= few[1] + 8192  # whole pages of the last subgroup


@given(workloads(), strategies(), SETTINGS)
def test_more_ranks_of_tensor_never_hold_more_each(
    given_workload: Workload, strategy: Strategy, settings: OptimizerConfig
) -> None:
    # Which whole tensors a rank is given, or keeps the gradients of, may turn out worse.
    stage = given_workload.parallel.zero_stage
    by_tensors = {"torch": (1,), "deepspeed": (1, 2), "megatron": ()}[given_workload.framework]
    one = replace(given_workload.parallel, zero_stage=0 if stage in by_tensors else stage)
    sizes = []
    for tensor in (1, 2, 4):
        parts = replace(given_workload, parallel=replace(one, tensor=tensor))
        sizes.append(in_memory(held(parts, strategy, settings=settings)))
    assert sizes == sorted(sizes, reverse=True)


@given(workloads(), SETTINGS, st.booleans(), st.booleans())
def test_states_are_as_many_wherever_they_lie(
    given_workload: Workload, settings: OptimizerConfig, early: bool, alone: bool
) -> None:
    totals = set()
    for placement in PLACEMENTS:
        strategy = Strategy(placement=placement, early_gradients=early)
        found = held(given_workload, strategy, device_is_host=alone, settings=settings)
        totals.add(sum(named(found, "optimizer states", tier=tier) for tier in TIERS))
    assert len(totals) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tier": "disk"}, "tier='disk'"), ({"phase": "x"}, "phase='x'"), ({"nbytes": -1}, "nbytes")],
)
def test_what_cannot_be_held_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Held(**{"name": "a", "tier": "device", "nbytes": 1, **changes})
