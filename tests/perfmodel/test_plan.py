"""A wrong setting is refused at once, in one line that says what is allowed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.plan import TIERS, ActivationsConfig, OptimizerConfig, canonical_tier

ROOT = Path(__file__).resolve().parents[2]
SIZES = [
    field.name for field in dataclasses.fields(ActivationsConfig) if field.name.endswith("_bytes")
]


def config(**settings: Any) -> ActivationsConfig:
    return ActivationsConfig(**{"path": "/spill"} | settings)


@pytest.mark.parametrize(
    ("name", "tier"),
    [("cpu", "host"), ("nvme", "ssd"), ("host", "host"), ("ssd", "ssd"), ("device", "device")],
)
def test_aliases_of_tiers_stand_for_their_tier(name: str, tier: str) -> None:
    assert canonical_tier(name) == tier
    assert config(tier=name).tier == tier


@pytest.mark.parametrize(
    ("name", "nearest"), [("sdd", "ssd"), ("nvm", "nvme"), ("hots", "host"), ("devise", "device")]
)
def test_an_unknown_tier_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"tier={name!r}.*did you mean {nearest!r}") as caught:
        canonical_tier(name)
    assert all(tier in str(caught.value) for tier in TIERS)


def test_a_directory_in_the_place_of_a_tier_is_pointed_out() -> None:
    with pytest.raises(ValueError, match=r"'/mnt/nvme' is not a tier.*is given as path="):
        canonical_tier("/mnt/nvme")


@pytest.mark.parametrize("name", [None, 3, b"ssd", ["ssd"], ""])
def test_what_is_no_name_is_no_tier(name: Any) -> None:
    with pytest.raises(ValueError, match="tier="):
        canonical_tier(name)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [-1, 1.5, "1GiB", True, float("nan"), [1]])
def test_a_size_is_a_whole_number_of_bytes(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}=") as caught:
        config(**{key: value})
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("staging_bytes", 4095),
        ("spill_bytes", 0),
        ("block_bytes", 0),
        ("block_bytes", 4097),
        ("block_bytes", (1 << 30) + 4096),
        ("queue_depth", 0),
        ("queue_depth", 4097),
        ("queue_depth", 2.0),
        ("queue_depth", True),
        ("queue_depth", "32"),
        ("io_engine", "aio"),
        ("io_engine", None),
        ("verify", "no"),
        ("direct", 1),
        ("recast_parameters", None),
        ("gds", 1),
        ("tolerated_slowdown", -0.01),
        ("tolerated_slowdown", 10.5),
        ("tolerated_slowdown", float("nan")),
        ("tolerated_slowdown", True),
        ("tolerated_slowdown", "5%"),
        ("ssd_rated_bytes", 0),
        ("ssd_write_amplification", 0),
        ("ssd_write_amplification", float("inf")),
        ("ssd_write_amplification", None),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}="):
        config(**{key: value})


@pytest.mark.parametrize("path", [3, None, b"/spill", ("/a", 4), {"/a": 1}])
def test_a_path_is_one_name_or_several(path: Any) -> None:
    with pytest.raises(ValueError, match="path="):
        config(path=path)


def test_several_paths_of_any_kind_become_strings() -> None:
    assert config(path=["/a", Path("/b")]).path == ("/a", "/b")
    assert config(path=Path("/b")).path == ("/b",)


def test_a_directory_counts_once() -> None:
    with pytest.raises(ValueError, match="names a directory twice"):
        config(path=["/a", "/b", "/a/"])


@pytest.mark.parametrize("path", [(), [], "", ("/a", "")])
def test_the_ssd_tier_needs_a_directory(path: Any) -> None:
    with pytest.raises(ValueError, match="path="):
        config(path=path)


def test_the_direct_way_leads_to_the_ssd_only() -> None:
    with pytest.raises(ValueError, match=r"gds=True leads to tier 'ssd', not to 'host'"):
        ActivationsConfig(tier="host", gds=True)


def test_other_tiers_need_none() -> None:
    assert ActivationsConfig(tier="host").path == ()


@pytest.mark.parametrize(
    ("key", "nearest"), [("stagin_bytes", "staging_bytes"), ("Path", "path"), ("verfy", "verify")]
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"activations.{key}.*did you mean {nearest!r}"):
        ActivationsConfig.from_mapping({"path": "/spill", key: 1})


def test_a_key_like_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"activations\.zzz.*known: tier, path"):
        ActivationsConfig.from_mapping({"zzz": 1})


def test_a_section_of_json_makes_a_config() -> None:
    section = {"tier": "nvme", "path": ["/a"], "verify": False, "keep_bytes": None}
    made = ActivationsConfig.from_mapping(section)
    assert made == ActivationsConfig(path=("/a",), verify=False)
    assert ActivationsConfig.from_mapping(dataclasses.asdict(made)) == made


def test_a_config_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().tier = "host"  # type: ignore[misc]


@given(st.dictionaries(st.sampled_from(SIZES), st.integers(-(1 << 70), 1 << 70)))
def test_any_sizes_are_taken_as_given_or_refused_by_name(sizes: dict[str, int]) -> None:
    try:
        made = config(**sizes)
    except ValueError as error:
        refused = [key for key, value in sizes.items() if str(error).startswith(f"{key}={value}")]
    else:
        refused = ["none"]
        assert all(getattr(made, key) == value for key, value in sizes.items())
    assert refused


def test_plans_need_nothing_but_the_standard_library() -> None:
    code = (
        "import sys, perfmodel.plan; sys.exit('torch' in sys.modules or 'offload' in sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}]; {code}"],
        check=True,
    )


def test_an_optimizer_section_makes_a_config_and_refuses_what_is_unknown() -> None:
    section = {"placement": "host=0.25,ssd=0.75", "path": ["/a"], "subgroup_params": 1000}
    made = OptimizerConfig.from_mapping(section)
    assert made.shares == {"host": 0.25, "ssd": 0.75}
    assert OptimizerConfig.from_mapping(dataclasses.asdict(made)) == made
    with pytest.raises(ValueError, match=r"optimizer\.placment.*did you mean 'placement'"):
        OptimizerConfig.from_mapping({"placment": "host"})


@pytest.mark.parametrize("cpus", [3, "0", [-1], [0.5], [True], [2000]])
def test_cpus_are_a_list_of_numbers(cpus: Any) -> None:
    assert OptimizerConfig(cpus=[0, 2]).cpus == (0, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cpus="):
        OptimizerConfig(cpus=cpus)


def test_a_size_with_a_unit_is_refused_with_the_bytes_it_stands_for() -> None:
    with pytest.raises(ValueError, match=r"staging_bytes='64MiB' is not a size.*: 67108864$"):
        OptimizerConfig(staging_bytes="64MiB")  # type: ignore[arg-type]
