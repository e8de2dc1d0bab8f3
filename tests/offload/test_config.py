"""The settings live in `perfmodel` and are the same objects here."""

from __future__ import annotations

import dataclasses
import inspect

import offload
import perfmodel.plan
import perfmodel.plan_file
from offload import config


def test_the_settings_are_those_of_the_plan() -> None:
    assert config.ActivationsConfig is perfmodel.plan.ActivationsConfig
    assert config.canonical_tier is perfmodel.plan.canonical_tier
    assert config.TIERS is perfmodel.plan.TIERS
    assert config.Plan is perfmodel.plan_file.Plan
    assert offload.ActivationsConfig is config.ActivationsConfig


def test_the_constructor_takes_every_setting_with_its_default() -> None:
    parameters = inspect.signature(offload.ActivationOffload).parameters
    fields = dataclasses.fields(config.ActivationsConfig)
    # The last are no settings: what stands in for a machine, and what is told to be unknown.
    assert list(parameters) == [*[field.name for field in fields], "emulated_device", "unknown"]
    for field in fields:
        assert parameters[field.name].default == field.default
