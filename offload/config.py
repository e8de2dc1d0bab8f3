"""The settings a run is made with; they are defined once, in `perfmodel`."""

from perfmodel.plan import TIERS, ActivationsConfig, OptimizerConfig, canonical_tier
from perfmodel.plan_file import Plan, read_plan
from perfmodel.schema import markdown, schema

__all__ = [
    "TIERS",
    "ActivationsConfig",
    "OptimizerConfig",
    "Plan",
    "canonical_tier",
    "markdown",
    "read_plan",
    "schema",
]
