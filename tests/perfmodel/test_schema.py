"""The schema says of each plan what reading it says, and the page about it is of today."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from perfmodel.plan import ActivationsConfig, OptimizerConfig
from perfmodel.plan_file import Limits, Plan, Predicted
from perfmodel.schema import markdown, schema
from tests.perfmodel.workloads import plans

ROOT = Path(__file__).resolve().parents[2]
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict}
TYPES |= {"array": list, "null": type(None)}
SCHEMA = schema()


def complaints(value: Any, rule: dict[str, Any], where: str = "plan") -> Iterator[str]:
    """Hold `value` against the words of JSON Schema that ours has."""
    known = {"$schema", "title", "description", "default"}
    known |= {"anyOf", "const", "type", "enum", "minimum", "items"}
    assert set(rule) <= known | {"properties", "additionalProperties", "required"}
    if "anyOf" in rule:
        each = [list(complaints(value, one, where)) for one in rule["anyOf"]]
        yield from [] if [] in each else each[0]
    if "const" in rule and value != rule["const"]:
        yield f"{where} is not {rule['const']}"
    kind = rule.get("type")
    if kind and (
        not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")
    ):
        yield f"{where} is no {kind}"
        return
    if "enum" in rule and value not in rule["enum"]:
        yield f"{where} is not one of {rule['enum']}"
    if "minimum" in rule and value < rule["minimum"]:
        yield f"{where} is below {rule['minimum']}"
    if kind == "array" and "items" in rule:
        for one in value:
            yield from complaints(one, rule["items"], f"{where}[]")
    if "properties" in rule:
        yield from (f"{where}.{key} is missing" for key in {*rule.get("required", ())} - {*value})
        for key, one in value.items():
            if key in rule["properties"]:
                yield from complaints(one, rule["properties"][key], f"{where}.{key}")
            elif rule["additionalProperties"] is False:
                yield f"{where}.{key} is not known"


@given(plans())
def test_every_plan_is_as_the_schema_says(plan: Plan) -> None:
    assert not list(complaints(plan.to_json(), SCHEMA))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"version": 2},
        {"version": 1, "activation": None},
        {"version": 1, "activations": {"mode": "sdd"}},
        {"version": 1, "activations": {"path": "/a", "stagin_bytes": 4096}},
        {"version": 1, "activations": {"path": "/a", "verify": 1}},
        {"version": 1, "activations": {"path": 3}},
        {"version": 1, "optimizer": {"cpus": "0"}},
        {"version": 1, "optimizer": {"threads": True}},
        {"version": 1, "tokens": {"mode": "gradients"}},
        {"version": 1, "limits": {"host_bytes": -1}},
        {"version": 1, "predicted": {"step_s": 1.0}},
        {"version": 1, "workload": {}},
        {"version": 1, "report": 3},
    ],
)
def test_what_the_schema_refuses_reading_refuses(wrong: dict[str, Any]) -> None:
    assert list(complaints(wrong, SCHEMA))
    with pytest.raises(ValueError, match=r"."):
        Plan.from_mapping(wrong)


def test_the_schema_is_one_of_its_draft() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_key_is_described() -> None:
    sections = SCHEMA["properties"]
    for name, kind in (
        ("activations", ActivationsConfig),
        ("optimizer", OptimizerConfig),
        ("limits", Limits),
        ("predicted", Predicted),
    ):
        found = sections[name]["anyOf"][0]["properties"]
        assert {field.name for field in dataclasses.fields(kind)} <= set(found)
    for section in sections.values():
        assert section.get("description") or "const" in section
        for each in section.get("anyOf", [{}])[0].get("properties", {}).values():
            assert each["description"]
    assert (
        "at the worst moment"
        in sections["predicted"]["anyOf"][0]["properties"]["peak_device_bytes"]["description"]
    )


def test_defaults_are_those_of_the_settings() -> None:
    found = SCHEMA["properties"]["optimizer"]["anyOf"][0]["properties"]
    assert json.loads(json.dumps(found["placement"]["default"])) == OptimizerConfig().placement
    assert found["subgroup_params"]["default"] == OptimizerConfig().subgroup_params


def test_the_page_of_all_keys_is_up_to_date() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == markdown(), "write it anew: offload schema --markdown > docs/config.md"
