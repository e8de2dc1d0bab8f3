"""A plan is read as it was written, refuses what is wrong in it, and what it is not made for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from perfmodel.machine import read_machine
from perfmodel.model import Model
from perfmodel.plan import ActivationsConfig, OptimizerConfig
from perfmodel.plan_file import ActivationsSection, Limits, Plan, read_plan
from perfmodel.workload import Parallel, Strategy, Workload
from tests.perfmodel.workloads import plans

MODEL = Model(name="gpt", num_layers=4, hidden_size=64, num_heads=4, vocab_size=100)
WORKLOAD = Workload(model=MODEL, seq_len=32, micro_batch=2, accumulation=3)
PLAN = Plan.of(WORKLOAD, Strategy(activations="ssd", placement="ssd"), path=("/nvme",))


def written(**changes: Any) -> dict[str, Any]:
    """A plan's JSON with some keys of its sections changed."""
    found: dict[str, Any] = PLAN.to_json()
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = found[key] | value if both else value
    return found


@given(plans())
def test_a_plan_is_read_as_it_was_written(plan: Plan) -> None:
    assert Plan.from_mapping(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_plan_is_what_its_strategy_says() -> None:
    plan = Plan.of(
        WORKLOAD,
        Strategy(activations="recompute", recompute=(1, 3), optimizer="torch"),
        limits=Limits(device_bytes=1 << 30),
    )
    assert plan.activations == ActivationsSection(mode="recompute", recompute=(1, 3))
    assert (plan.optimizer, plan.limits.device_bytes) == (None, 1 << 30)
    assert (plan.micro_batch, plan.accumulation) == (2, 3)
    assert PLAN.activations.offload == ActivationsConfig(path=("/nvme",))
    assert PLAN.optimizer == OptimizerConfig(placement="ssd", path=("/nvme",))


def test_a_strategy_on_the_ssd_needs_a_directory() -> None:
    with pytest.raises(ValueError, match="path="):
        Plan.of(WORKLOAD, Strategy(activations="ssd"))


def test_what_is_left_out_is_kept_where_it_is() -> None:
    plan = Plan.from_mapping({"version": 1})
    assert plan == Plan()
    assert plan == Plan.from_mapping({"version": 1, "activations": None, "optimizer": None})
    assert (plan.activations.mode, plan.activations.offload) == ("keep", None)


@pytest.mark.parametrize(
    ("section", "mode", "tier"),
    [
        ({"path": "/a"}, "ssd", "ssd"),
        ({"tier": "cpu"}, "host", "host"),
        ({"mode": "host"}, "host", "host"),
        ({"mode": "auto", "path": "/a"}, "auto", "ssd"),
        ({"mode": "auto", "tier": "host", "recompute": [2, 0]}, "auto", "host"),
    ],
)
def test_mode_and_tier_follow_from_each_other(
    section: dict[str, Any], mode: str, tier: str
) -> None:
    made = ActivationsSection.from_mapping(section)
    assert made.offload is not None
    assert (made.mode, made.offload.tier) == (mode, tier)
    assert made.recompute == ((0, 2) if "recompute" in section else None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation": {}}, r"plan\.activation is not a setting, did you mean 'activations'"),
        ({"activations": {"stagin_bytes": 1}}, r"activations\.stagin_bytes.*'staging_bytes'"),
        ({"activations": {"recomputed": []}}, r"activations\.recomputed.*'recompute'"),
        (
            {"activations": {"staging_bytes": "1MiB"}},
            r"^activations: staging_bytes=.*1048576",
        ),
        ({"activations": {"mode": "sdd"}}, r"activations: mode='sdd'.*did you mean 'ssd'"),
        ({"activations": {"mode": "keep"}}, r"activations: mode='keep' has no tier"),
        (
            {"activations": {"mode": "host"}},
            r"activations: mode='host' does not go with tier=",
        ),
        ({"activations": {"tier": "device", "mode": None}}, r"activations: mode='device'"),
        ({"activations": {"recompute": [1, 1]}}, r"activations: recompute=.* twice"),
        ({"activations": {"recompute": [0.5]}}, r"activations: recompute=0.5"),
        ({"activations": {"recompute": 3}}, r"activations: recompute=3"),
        ({"activations": ["ssd"]}, r"activations is an object with keys, or null, not \['ssd'\]"),
        ({"optimizer": {"placment": "host"}}, r"optimizer\.placment.*'placement'"),
        ({"optimizer": {"update_schedule": 3}}, r"optimizer: update_schedule=3"),
        ({"optimizer": "host"}, r"optimizer is an object"),
        (
            {"tokens": {"mode": "gradients"}},
            r"tokens: mode='gradients' is not known",
        ),
        (
            {"tokens": {"mlp_tile_tokens": 8}},
            r"tokens: mlp_tile_tokens says nothing with mode='off'",
        ),
        ({"tokens": {"mode": "exact", "loss_segment_tokens": 0}}, r"loss_segment_tokens=0 is not"),
        ({"tokens": {"mode": "of"}}, r"tokens: mode='of' is not known.*'off'"),
        ({"limits": {"device_byte": 1}}, r"limits\.device_byte.*'device_bytes'"),
        ({"limits": {"ssd_bytes": -1}}, r"limits: ssd_bytes=-1"),
        ({"report": ""}, r"report=''"),
        ({"report": 3}, r"report=3"),
        ({"micro_batch": 0}, r"micro_batch=0"),
        ({"micro_batch": 3}, r"micro_batch=3 is not the 2 of its workload"),
        ({"predicted": {"step_s": 1}}, r"predicted: peak_device_bytes is missing"),
        ({"workload": {"fingerprint": "ab"}}, r"workload: fingerprint='ab'"),
        ({"workload": {"of": {"seq_len": 3}}}, r"workload: fingerprint=.*is not that of"),
        ({"workload": {"description": 3}}, r"workload: description=3"),
        ({"version": 2}, r"version=2 is not known; this release reads version 1"),
        ({"version": True}, r"version=True is not known"),
        ({"version": "1"}, r"version='1' is not known"),
    ],
)
def test_what_is_wrong_in_a_plan_is_named_in_one_line(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        Plan.from_mapping(written(**changes))
    assert "\n" not in str(caught.value)


def test_a_plan_says_its_version() -> None:
    with pytest.raises(ValueError, match="version is missing; this release reads version 1"):
        Plan.from_mapping({"activations": None})


@pytest.mark.parametrize("data", [None, [], "plan", 3])
def test_a_plan_is_an_object(data: Any) -> None:
    with pytest.raises(ValueError, match="object with keys"):
        Plan.from_mapping(data)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(WORKLOAD, seq_len=64), "seq_len is 32 in the plan and 64 here$"),
        (replace(WORKLOAD, micro_batch=4), "micro_batch is 2 in the plan and 4 here$"),
        (
            replace(WORKLOAD, parallel=Parallel(data=2)),
            "parallel.data is 1 in the plan and 2 here$",
        ),
        (
            replace(WORKLOAD, model=replace(MODEL, num_layers=5)),
            "model.num_layers is 4 in the plan and 5 here$",
        ),
    ],
)
def test_another_workload_is_refused_by_what_differs(other: Workload, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PLAN.check_workload(other)
    PLAN.check_workload(WORKLOAD)


def test_of_a_workload_that_differs_in_much_only_some_is_said() -> None:
    other = Workload(
        model=replace(MODEL, num_layers=2, hidden_size=128, vocab_size=7, dropout=0.5),
        seq_len=8,
        dtype="float32",
    )
    with pytest.raises(ValueError, match=r"; and \d+ more$") as caught:
        PLAN.check_workload(other)
    assert "\n" not in str(caught.value)


def test_what_a_model_is_called_does_not_count() -> None:
    PLAN.check_workload(replace(WORKLOAD, model=replace(MODEL, name="/models/gpt")))


def test_a_plan_for_nothing_in_particular_fits_all() -> None:
    Plan().check_workload(WORKLOAD)


def test_a_plan_without_its_workload_still_refuses_another() -> None:
    bare = Plan.from_mapping(written(workload={"of": None}))
    bare.check_workload(WORKLOAD)
    with pytest.raises(ValueError, match="was made for gpt"):
        bare.check_workload(replace(WORKLOAD, seq_len=64))


def test_a_machine_is_known_by_its_speeds_alone() -> None:
    machine = read_machine("laptop")
    drive, host = machine.drive, machine.host
    assert drive is not None
    plan = Plan.of(WORKLOAD, Strategy(), machine=machine)
    fuller = replace(drive, free_bytes=drive.free_bytes // 2 + 1, path="/elsewhere")
    assert plan.is_for_machine(replace(machine, name="mine", drive=fuller))
    assert not plan.is_for_machine(replace(machine, host=replace(host, cores=host.cores + 1)))
    assert not plan.is_for_machine(
        replace(machine, drive=replace(drive, write_bytes_per_s=2 * drive.write_bytes_per_s))
    )
    assert not Plan().is_for_machine(machine)


def test_a_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN.to_json()))
    assert read_plan(path) == PLAN
    path.write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json is no JSON"):
        read_plan(path)
    path.write_text('{"version": 3}')
    with pytest.raises(ValueError, match=r"plan\.json: version=3"):
        read_plan(str(path))
    with pytest.raises(FileNotFoundError):
        read_plan(tmp_path / "missing.json")


def test_a_plan_that_is_not_there_and_one_in_a_wrapper_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"perfmodel plan .* -o FILE"):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="give what is under it"):
        Plan.from_mapping({"version": 1, "offload": {}})
