"""The plan's JSON Schema and its reference in Markdown, both out of the dataclasses themselves.

What a key means is the text that stands under it in the source.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from perfmodel.plan import (
    DTYPES,
    IO_ENGINES,
    SCHEDULES,
    TIER_ALIASES,
    ActivationsConfig,
    OptimizerConfig,
)
from perfmodel.plan_file import (
    MODES,
    SECTIONS,
    VERSION,
    ActivationsSection,
    Plan,
)
from perfmodel.token_plan import TOKEN_MODES, TokensSection

__all__ = ["markdown", "schema"]

Json = dict[str, Any]
# Where only some names are allowed; tiers by their aliases as well.
CHOICES: Mapping[tuple[type, str], tuple[str, ...]] = {
    (ActivationsSection, "mode"): MODES,
    (TokensSection, "mode"): TOKEN_MODES,
    (ActivationsConfig, "tier"): ("host", "ssd", *TIER_ALIASES),
    (ActivationsConfig, "schedule"): SCHEDULES,
    (ActivationsConfig, "io_engine"): IO_ENGINES,
    (OptimizerConfig, "io_engine"): IO_ENGINES,
    (OptimizerConfig, "accumulate_dtype"): DTYPES,
}
PREFACE = (
    "`offload schema --markdown` prints this page, `offload schema` the JSON Schema of the same. A "
    f'plan is one object with `"version": {VERSION}`, required, and the keys below; a key that is '
    "not known is an error. It may stand under the top-level key `offload` of a DeepSpeed config. "
    "Sizes are whole numbers of bytes."
)
SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string"}


@cache
def _descriptions(kind: type) -> Mapping[str, str]:
    """Return the text under each field of a dataclass, in one line each."""
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    found: dict[str, str] = {}
    body = made.body if isinstance(made, ast.ClassDef) else []
    for one, after in pairwise(body):
        if not (isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = " ".join(str(after.value.value).split())
            found[one.target.id] = re.sub(r"\bNone:", "null:", text)
    return found


def _own_fields(kind: type) -> Iterator[tuple[type, Field[Any]]]:
    """Yield what stands in a section's JSON, and where it is defined."""
    for one in fields(kind):
        if kind is ActivationsSection and one.name == "offload":
            # Its keys stand beside those of the section.
            yield from ((ActivationsConfig, each) for each in fields(ActivationsConfig))
        else:
            yield kind, one


def _of_type(hint: Any) -> Json:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        options = [_of_type(each) for each in parts if each is not NoneType]
        return {"anyOf": [*options, {"type": "null"}]} if NoneType in parts else options[0]
    if origin is tuple:
        return {"type": "array", "items": _of_type(parts[0])}
    if hint in SCALARS:
        return {"type": SCALARS[hint]}
    if isinstance(hint, type) and is_dataclass(hint):
        return _of_section(hint)
    return {"type": "object"}


def _of_field(kind: type, one: Field[Any]) -> Json:
    found = _of_type(get_type_hints(kind)[one.name])
    if one.name == "path":  # one name stands for a list of one
        found = {"anyOf": [{"type": "string"}, found]}
    innermost = found["anyOf"][0] if "anyOf" in found else found
    if (kind, one.name) in CHOICES:
        innermost["enum"] = list(CHOICES[kind, one.name])
    if innermost.get("type") in ("integer", "number"):
        innermost["minimum"] = 0
    described = _descriptions(kind).get(one.name)
    if described:
        found["description"] = described
    # Which mode it is without one, other keys say.
    if one.default is not MISSING and (kind, one.name) != (ActivationsSection, "mode"):
        found["default"] = list(one.default) if isinstance(one.default, tuple) else one.default
    return found


def _of_section(kind: type) -> Json:
    owned = list(_own_fields(kind))
    found: Json = {
        "type": "object",
        "properties": {one.name: _of_field(where, one) for where, one in owned},
        "additionalProperties": False,
    }
    needed = [one.name for _, one in owned if one.default is one.default_factory is MISSING]
    return found | ({"required": needed} if needed else {})


def schema() -> Json:
    """Return the JSON Schema (draft 2020-12) of a plan."""
    found = _of_section(Plan)
    for name in SECTIONS:
        whole = found["properties"][name]
        described = {"description": whole.pop("description")}
        whole.pop("default", None)
        options = whole.get("anyOf") or [whole, {"type": "null"}]
        found["properties"][name] = described | {"anyOf": options}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A plan of offload",
        **found,
        "properties": {"version": {"const": VERSION}, **found["properties"]},
        "required": ["version"],
    }


# ---- Markdown ------------------------------------------------------------------------------------


def _said_type(one: Json) -> str:
    if "anyOf" in one:
        return " or ".join(_said_type(each) for each in one["anyOf"])
    if "enum" in one:
        return " or ".join(f"`{json.dumps(each)}`" for each in one["enum"])
    items = one.get("items", {}).get("type", "value")
    return f"list of {items}s" if one["type"] == "array" else str(one["type"])


def _entries(properties: Json, needed: Sequence[str] = ()) -> Iterator[str]:
    for name, one in properties.items():
        otherwise = f"; default `{json.dumps(one['default'])}`" if "default" in one else ""
        must = "; required" if name in needed else ""
        text = f"- **`{name}`** ({_said_type(one)}{otherwise}{must}): {one['description']}"
        yield "\n".join(_wrapped(text, subsequent_indent="  "))


def _wrapped(text: str, **more: Any) -> list[str]:
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False, **more)


def markdown() -> str:
    """Return the reference of all keys, for `docs/config.md`."""
    properties = schema()["properties"]
    plain = {name: one for name, one in properties.items() if name not in SECTIONS}
    del plain["version"]
    lines = ["# The plan's JSON", "", *_wrapped(PREFACE), "", *_entries(plain)]
    for name in SECTIONS:
        section = properties[name]["anyOf"][0]
        lines += ["", f"## `{name}`", "", *_wrapped(properties[name]["description"]), ""]
        lines += _entries(section["properties"], section.get("required", ()))
        for key, one in section["properties"].items():
            within = next((each for each in one.get("anyOf", []) if "properties" in each), None)
            if within is not None:
                lines += ["", f"### `{name}.{key}`", "", *_entries(within["properties"])]
    return "\n".join(lines) + "\n"
